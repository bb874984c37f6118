"""Puts `tests/` on the path, so that every test file can `from tiny_models import tiny_model`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
