"""Makes `import subbit` enough for `AutoModelForCausalLM.from_pretrained(packed folder)`.

`import subbit` must stay light, and transformers has no entry point for quantizers. So when
transformers' table of quantizers is not loaded yet, a finder waits for that one module, adds ours
to the table as soon as it exists, and is gone. Nothing of transformers is changed; the table is its
public registry. Standard library only.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

_TABLE = "transformers.quantizers.auto"


def _register() -> None:
    ours = sys.modules.get("subbit.hub.quantizer")
    if ours is not None and not hasattr(ours, "register"):
        return  # it is just being imported, asked for the table first, and registers at its end
    from subbit.hub.quantizer import register

    register()


class _Loader(importlib.abc.Loader):
    """Loads the table as its own loader would, then registers the packed format."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # tracebacks and inspect find the source through these
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the table of quantizers, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


def install() -> None:
    """Register the packed format with transformers now if it is loaded, else when it will be."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
