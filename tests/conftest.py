"""Settings that must be made before anything is imported."""

import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    # Triton's kernels run in its interpreter; it decides when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")
