"""Which linears of a loaded model the CPU kernel multiplies with."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import nn

from subbit.errors import FormatError, RecipeError
from subbit.hub.inspect import read_config
from subbit.packed.kernels import fits, kernel_name
from subbit.packed.linear import PackedLinear, packed_modules

__all__ = ["BACKENDS", "choose_on_load", "keep_reference", "kernel_in_words", "set_backend"]

BACKENDS = ("auto", "reference", "cpu")

_automatic = ContextVar("automatic", default=True)


def set_backend(model: nn.Module, backend: str = "auto", planes: int = 2) -> dict[str, int]:
    """Choose what multiplies, linear by linear: memory grows by one linear at a time.

    Args:
        model: holds `PackedLinear` modules; those that a kernel does not fit stay on the reference.
        backend: "reference", "cpu" (the resident layouts B3 and B2 and their kernels, or without
            compiled kernels torch on decoded panels), or "auto": the CPU kernel where it was
            compiled and fits. `SUBBIT_KERNEL=off` in the environment means "reference" whatever is
            asked.
        planes: 2 or 1, see `PackedLinear`.

    Returns:
        Number of linears on each backend.

    Raises:
        RecipeError: an unknown backend or number of planes, or "cpu" for a model of which no linear
            fits.
        FormatError: damaged codes; the message names the linear.
    """
    if backend not in BACKENDS:
        raise RecipeError(f"backend is '{backend}'; use one of {', '.join(BACKENDS)}")
    if planes not in (1, 2):
        raise RecipeError(f"activation planes are {planes}; use 2 (exact to 1e-4) or 1 (to 1e-2)")
    name = kernel_name()
    wanted = backend == "cpu" or (backend == "auto" and name != "torch")
    wanted = wanted and name != "reference"
    modules = packed_modules(model)
    if backend == "cpu" and not any(_can(module) for module in modules.values()):
        raise RecipeError(
            "no linear of this model suits the CPU kernel: compress it with levels: int8, at most "
            "8 levels (7 if pruned, 6 beside 4 salient ones) and a blocksize of 128, and load it "
            "on the CPU"
        )
    counts = {"reference": 0, "cpu": 0}
    for name, module in modules.items():
        own = "cpu" if wanted and _can(module) else "reference"
        try:
            module.set_backend(own)
        except FormatError as error:
            raise FormatError(f"'{name}': {error}") from error
        module.planes = planes
        counts[own] += 1
    return counts


def choose_on_load(model: nn.Module) -> None:
    """What `from_pretrained` does when all weights are there: `set_backend(model, "auto")`.

    Not where accelerate moves weights between devices, nor within `keep_reference`.

    Raises:
        FormatError: damaged codes; the message names the linear.
        RecipeError: an environment variable that chooses kernels is unknown.
    """
    if _automatic.get() and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        set_backend(model, "auto")


@contextmanager
def keep_reference() -> Iterator[None]:
    """Have `from_pretrained` leave every linear on the reference, for the caller to choose."""
    token = _automatic.set(False)
    try:
        yield
    finally:
        _automatic.reset(token)


def kernel_in_words(folder: str | Path) -> str:
    """What would multiply with a packed folder's linears on this machine's CPU, in a sentence.

    Raises:
        ModelError: the folder is no packed model.
        FormatError: its config is damaged, or newer than this program.
        RecipeError: an environment variable that chooses kernels is unknown.
    """
    layouts = [layout for layout, _ in read_config(folder).layouts().values()]
    fast = sum(fits(layout) for layout in layouts)
    return f"CPU kernel on this machine: {kernel_name()}, for {fast} of {len(layouts)} linears."


def _can(module: PackedLinear) -> bool:
    if not fits(module.layout):
        return False
    place = module.tiles if module.backend == "cpu" else module.levels
    return place.device.type == "cpu"
