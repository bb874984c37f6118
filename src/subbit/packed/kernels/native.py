"""The compiled kernels (b3.cpp and b3/), reached through ctypes: which there are, and calls.

The shared object is built with the package where there is a C++ compiler. It needs no torch to be
built and none of torch's headers; with torch loaded first both share one OpenMP.

Two environment variables choose for all linears: `SUBBIT_KERNEL=off` leaves every linear on the
reference, `SUBBIT_ISA=portable|avx2|avxvnni|avx512|amx|neon|neondot` names the instruction set; a
process reads it once, since looking it up for every product takes a part of a small one's time.
"""

import ctypes
import os
import platform
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from subbit.errors import RecipeError, SubbitError, nearest
from subbit.packed.kernels.layout import check_sizes

__all__ = ["available", "dense", "kernel_name", "linear", "processor", "read", "worthwhile"]

_VERSION = 5
_ISAS = {  # from the slowest on
    "portable": 0, "avx2": 1, "avxvnni": 2, "avx512": 3, "amx": 6, "neon": 4, "neondot": 5,
}  # fmt: skip
# How many vectors of (bfloat16, other types) the kernel multiplies sooner than torch does with
# decoded panels, measured on Zen 5, AMX on Sapphire Rapids (NEON: assumed). With AMX more than 64
# of bfloat16 are multiplied as torch would do it, with weights rounded to bfloat16.
_ANY = 1 << 62
_WORTHWHILE = {
    "portable": (1, 1),
    "avx2": (8, 64),
    "avxvnni": (16, _ANY),
    "avx512": (32, _ANY),
    "amx": (_ANY, _ANY),
    "neon": (8, 64),
    "neondot": (16, _ANY),
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LINEAR = struct.Struct("@PqqPqPqqqPqqq")  # `Linear` in b3.cpp: one argument is soon handed over
_ERRORS = {1: "sizes or flags that do not fit", 2: "no memory", 3: "an unknown instruction set"}


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built."""
    for path in sorted(Path(__file__).parent.glob("_b3*.so")):
        try:
            found = ctypes.CDLL(str(path))
            version = found.subbit_b3_version()
        except (OSError, AttributeError):
            continue
        if version == _VERSION:
            pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
            weights = [pointer, size, pointer, size, size, size]
            found.subbit_b3_linear.argtypes = [ctypes.c_char_p]
            found.subbit_b3_dense.argtypes = [*weights, size, size, pointer, number, number, number]
            found.subbit_b3_read.argtypes = [pointer, size, number, number, number]
            found.subbit_b3_read.restype = ctypes.c_uint64
            return found
    return None


@cache
def _isa() -> str:
    """The instruction set to use: the best that this processor has, or what `SUBBIT_ISA` says."""
    library, wanted = _library(), os.environ.get("SUBBIT_ISA")
    has = [name for name, code in _ISAS.items() if library and library.subbit_b3_supports(code)]
    if wanted is None:
        return has[-1] if has else "torch"
    if wanted not in _ISAS:
        raise RecipeError(f"SUBBIT_ISA is '{wanted}'{nearest(wanted, _ISAS)}")
    if library is not None and wanted not in has:
        raise RecipeError(
            f"SUBBIT_ISA is '{wanted}', which this processor lacks; it has: {', '.join(has)}"
        )
    return wanted if library is not None else "torch"


def kernel_name() -> str:
    """What multiplies with linears in the resident layout on this machine's CPU.

    Returns:
        An instruction set ("amx", "avx512", "avxvnni", "avx2", "neondot", "neon", "portable");
        "torch" = panels decoded and multiplied by torch, for want of a compiled kernel; "reference"
        = kernels are turned off.

    Raises:
        RecipeError: `SUBBIT_KERNEL` or `SUBBIT_ISA` is unknown or not what this processor has.
    """
    switch = os.environ.get("SUBBIT_KERNEL", "on")
    if switch not in ("on", "off"):
        raise RecipeError(f"SUBBIT_KERNEL is '{switch}'; use on or off")
    return "reference" if switch == "off" else _isa()


def processor() -> str:
    """What the operating system calls the processor, and how many of its cores it sees."""
    name = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        models = (line.partition(":")[2] for line in lines if line.startswith("model name"))
        name = next(models, name)
    return f"{name.strip()}, {os.cpu_count()} cores"


def available() -> bool:
    """Whether compiled kernels are there and `SUBBIT_KERNEL` does not turn them off."""
    return kernel_name() not in ("reference", "torch")


def worthwhile(isa: str, dtype: torch.dtype) -> int:
    """Largest batch of activations of `dtype` that `linear` multiplies."""
    return _WORTHWHILE[isa][dtype != torch.bfloat16]


def _weights(tiles: Tensor, flags: Tensor, rows: int, cols: int) -> tuple[int, ...]:
    """The arguments that name a linear's weights, checked: C trusts them."""
    check_sizes(tiles, flags, rows, cols)
    if not (tiles.is_cpu and flags.is_cpu and tiles.is_contiguous() and flags.is_contiguous()):
        raise ValueError("tiles and flags must be contiguous and on the CPU.")
    return tiles.data_ptr(), tiles.numel(), flags.data_ptr(), flags.numel(), rows, cols


def _check(status: int) -> None:
    if status:
        raise SubbitError(f"the CPU kernel reports {_ERRORS.get(status, status)}; report this bug.")


def linear(
    x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int, planes: int
) -> Tensor | None:
    """Multiply a few vectors, float32 or bfloat16 `(..., cols)`, contiguous, on the CPU.

    This runs for every linear and token: what is not needed is not asked.

    Args:
        planes: 2 = activations of about 16 bits (relative error <= 1e-4), 1 = of 8 (<= 1e-2). With
            AMX more than 64 vectors of bfloat16 stay as they are, and the weights are rounded.

    Returns:
        `(..., rows)` in the dtype of x, or None where panels are the better way: without compiled
        kernels, for no vector, and for more than are `worthwhile`.
    """
    isa = _isa()
    before = x.shape[:-1]
    batch = before.numel()
    if isa == "torch" or not 0 < batch <= worthwhile(isa, x.dtype):
        return None
    if x.shape[-1] != cols or planes not in (1, 2) or not (x.is_cpu and x.is_contiguous()):
        raise ValueError(
            f"x {tuple(x.shape)}, planes {planes} do not fit a linear of {cols} columns, or x is "
            "not contiguous and on the CPU."
        )
    weights = _weights(tiles, flags, rows, cols)
    out = x.new_empty(*before, rows)
    call = _LINEAR.pack(
        x.data_ptr(),
        _DTYPES[x.dtype],
        batch,
        *weights,
        out.data_ptr(),
        planes,
        _ISAS[isa],
        torch.get_num_threads(),
    )
    _check(_library().subbit_b3_linear(call))
    return out


def dense(
    tiles: Tensor, flags: Tensor, rows: int, cols: int, start: int, stop: int, out: Tensor
) -> bool:
    """Decode rows `start:stop` into `out`, float32 or bfloat16 `(stop - start, cols)`, contiguous.

    Returns:
        False, with `out` untouched, without compiled kernels.
    """
    isa = _isa()
    if isa == "torch":
        return False
    if not 0 <= start <= stop <= rows or out.shape != (stop - start, cols):
        raise ValueError(f"rows {start}:{stop} of ({rows}, {cols}) do not fit {tuple(out.shape)}.")
    # a tensor that is fake or elsewhere has no memory that C could write to
    if type(out) is not Tensor or not (out.is_cpu and out.is_contiguous()):
        raise ValueError(f"{type(out).__name__} on {out.device} is not contiguous and on the CPU.")
    status = _library().subbit_b3_dense(
        *_weights(tiles, flags, rows, cols),
        start,
        stop,
        out.data_ptr(),
        _DTYPES[out.dtype],
        _ISAS[isa],
        torch.get_num_threads(),
    )
    _check(status)
    return True


def read(data: Tensor, streams: bool = True) -> int:
    """Read a contiguous tensor once, by whole 64 KiB: with streams, as fast as this machine can.

    That takes the time that a kernel which reads as many bytes from memory can hardly undercut.

    Args:
        data: any tensor on the CPU.
        streams: read several streams side by side, as the kernels do; or else one, as a plain loop
            does, which leaves some of the bandwidth unused on many processors.

    Returns:
        The xor of the 64-bit words read; 0, having read nothing, without compiled kernels.
    """
    isa = _isa()
    if isa == "torch":
        return 0
    if data.device.type != "cpu" or not data.is_contiguous():
        raise ValueError("only a contiguous tensor on the CPU can be read.")
    nbytes = data.numel() * data.element_size()
    threads = torch.get_num_threads()
    return _library().subbit_b3_read(data.data_ptr(), nbytes, int(streams), _ISAS[isa], threads)
