"""Settings that must be made before anything is imported, and what tests of several rooms share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("subbit", deadline=None)  # a busy machine is no failure
settings.load_profile("subbit")

# code that comes with a model is copied here, and not into the user's cache
_MODULES = tempfile.mkdtemp(prefix="subbit-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES
atexit.register(shutil.rmtree, _MODULES, ignore_errors=True)

if not Path("/dev/nvidia0").exists():
    # Triton's kernels run in its interpreter; it decides when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = "the quick brown fox jumps over a lazy dog while seven wizards box with gin and tea "
    path.write_text("".join(words[i % 17 :] + "\n" for i in range(40)))
    return str(path)


@pytest.fixture(autouse=True)
def same_draws_in_every_order():
    """Tests that draw from torch's own generator draw the same, whatever ran before."""
    import torch

    torch.manual_seed(0)
