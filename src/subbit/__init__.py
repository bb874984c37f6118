"""subbit: Hugging Face causal LLMs at one bit and below, as real packed files."""

import importlib
from typing import Any

from subbit.hub import hook

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "compress", "load"]

_LAZY = {"compress": "subbit.compression", "load": "subbit.hub.load", "Recipe": "subbit.recipe"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'subbit' has no attribute '{name}'")


hook.install()  # transformers can load packed models from now on; imports nothing heavy
