"""Settings that must be made before anything is imported, and what tests of several rooms share."""

import os
from pathlib import Path

import pytest

if not Path("/dev/nvidia0").exists():
    # Triton's kernels run in its interpreter; it decides when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = "the quick brown fox jumps over a lazy dog while seven wizards box with gin and tea "
    path.write_text("".join(words[i % 17 :] + "\n" for i in range(40)))
    return str(path)
