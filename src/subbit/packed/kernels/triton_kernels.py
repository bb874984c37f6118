"""Products with weights in the layouts B3 and B2 on a GPU: a plain GEMV and a plain GEMM in Triton.

They decode codes straight from the resident bytes (`layout.py`) and look levels up in memory. Both
are checked against the reference in Triton's interpreter and compiled for a GPU without one; on a
GPU neither was run or timed yet, and nothing chooses them by itself: the operator `b3_linear`
takes them for tensors on a CUDA device.

In Triton's interpreter (`TRITON_INTERPRET=1`, set before this module is imported) tensors are on
the CPU; there a product of bfloat16 is wrong, so the type that is multiplied is a constant of the
kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subbit.packed.kernels.layout import UNIT_ROWS, check_sizes

__all__ = ["gemm_kernel", "gemv_kernel", "multiply"]

_VECTORS = 32  # that a program of the GEMM multiplies with
_GEMM_ROWS = 64


@triton.jit
def _weights(unit, flags, split, rows, cols, C: tl.constexpr, BITS: tl.constexpr):
    """Decode weights: `rows` (R, 1) within a unit, `cols` (1, C) of its block; `unit` (R, 1) or
    scalar and `flags` point at unit and block; `split`: the last flag of all, not 0 where there are
    salient levels; BITS: of a code, 3 or 2."""
    k, j = cols // 16, cols % 16
    planes: tl.constexpr = (C * BITS + 127) // 128
    tile = unit + rows // 4 * (64 * planes) + rows % 4 * 16 + j
    record = unit + 256 * planes + rows * (12 if BITS == 3 else 6)
    if BITS == 3:
        first = tl.load(tile + tl.where(k < 6, k // 2, k - 6) * 64).to(tl.int32)
        third = tl.load(tile + 128, mask=(k >= 6) & (rows >= 0), other=0).to(tl.int32)
        code = tl.where(k < 6, first >> (k % 2 * 3) & 7, first >> 6 | (third >> (k - 2) & 4))
    else:
        code = tl.load(tile + k // 4 * 64).to(tl.int32) >> (k % 4 * 2) & 3
    place = tl.where(code > 0, code - 1, 7 if BITS == 3 else 3)
    some = code >= 0
    if BITS == 3:  # looked up here and not in Python, which would wait for the GPU
        salient = tl.load(flags + cols).to(tl.int32) != 0
        place = tl.where(split != 0, tl.where(salient, 5, -1) + code, place)
        some = some & ((split == 0) | ((code > 0) & (code <= tl.where(salient, 4, 7))))
    level = tl.load(record + place, mask=some, other=128).to(tl.int32)
    scale: tl.constexpr = 10 if BITS == 3 else 4
    low, high = tl.load(record + scale).to(tl.int32), tl.load(record + scale + 1).to(tl.int32)
    value = (low << 16 | high << 24).to(tl.float32, bitcast=True)
    return (level - 128).to(tl.float32) * value


@triton.jit
def gemv_kernel(
    x, tiles, flags, y, rows, cols, full, stride,
    HALF: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A program multiplies 16 rows with one vector: grid (strips, batch)."""
    strip, vector = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)[:, None]
    col = tl.arange(0, 128)[None, :]
    unit = tiles + strip.to(tl.int64) * stride
    size: tl.constexpr = 960 if BITS == 3 else 608  # bytes of a unit of 128 columns
    x += vector.to(tl.int64) * cols
    split = tl.load(flags + full * 128 + (64 if HALF else 0)).to(tl.int32)
    sums = tl.zeros((16,), tl.float32)
    for block in range(full):
        w = _weights(unit + block * size, flags + block * 128, split, row, col, 128, BITS)
        at = block * 128 + col
        sums += tl.sum(w * tl.load(x + at, mask=at < cols, other=0).to(tl.float32), 1)
    if HALF:
        col = tl.arange(0, 64)[None, :]
        w = _weights(unit + full * size, flags + full * 128, split, row, col, 64, BITS)
        at = full * 128 + col
        sums += tl.sum(w * tl.load(x + at, mask=at < cols, other=0).to(tl.float32), 1)
    out = strip * 16 + tl.arange(0, 16)
    tl.store(y + vector.to(tl.int64) * rows + out, sums.to(y.dtype.element_ty), mask=out < rows)


@triton.jit
def gemm_kernel(
    x, tiles, flags, y, batch, rows, cols, full, stride, strips,
    HALF: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """A program multiplies ROWS rows with VECTORS vectors: grid (row tiles, vector tiles)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    vector = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)[None, :]
    strip = tl.minimum(row // 16, strips - 1)  # rows that do not exist decode another's
    unit = tiles + strip.to(tl.int64) * stride
    size: tl.constexpr = 960 if BITS == 3 else 608  # bytes of a unit of 128 columns
    x += vector.to(tl.int64) * cols
    split = tl.load(flags + full * 128 + (64 if HALF else 0)).to(tl.int32)
    sums = tl.zeros((ROWS, VECTORS), tl.float32)
    col = tl.arange(0, 128)
    for block in range(full):
        w = _weights(
            unit + block * size, flags + block * 128, split, row % 16, col[None, :], 128, BITS
        )
        at = block * 128 + col[:, None]
        values = tl.load(x + at, mask=(at < cols) & (vector < batch), other=0)
        sums = tl.dot(w.to(DOT), values.to(DOT), sums, input_precision="ieee")
    if HALF:
        col = tl.arange(0, 64)
        w = _weights(
            unit + full * size, flags + full * 128, split, row % 16, col[None, :], 64, BITS
        )
        at = full * 128 + col[:, None]
        values = tl.load(x + at, mask=(at < cols) & (vector < batch), other=0)
        sums = tl.dot(w.to(DOT), values.to(DOT), sums, input_precision="ieee")
    tl.store(
        y + vector.to(tl.int64) * rows + row,
        sums.to(y.dtype.element_ty),
        mask=(row < rows) & (vector < batch),
    )


def multiply(x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int) -> Tensor:
    """`y = x Wᵀ` by the GEMV for one vector, by the GEMM for more.

    Args:
        x: float32, bfloat16 or float16 `(batch, cols)`, contiguous, on the device of the weights.
        tiles, flags: uint8, of `layout.sizes` bytes.

    Returns:
        `(batch, rows)` in the dtype of x.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if x.shape[1] != cols:
        raise ValueError(f"x {tuple(x.shape)} does not fit a linear ({rows}, {cols}).")
    bits = check_sizes(tiles, flags, rows, cols)
    batch, strips = x.shape[0], -(-rows // UNIT_ROWS)
    rest = cols % 128
    half = 0 < rest <= 64
    full = cols // 128 + (rest > 64)
    y = x.new_empty(batch, rows)
    if batch == 0:
        return y
    weights = rows, cols, full, tiles.numel() // strips
    if batch == 1:
        with torch.cuda.device_of(x):
            gemv_kernel[(strips, 1)](x, tiles, flags, y, *weights, HALF=half, BITS=bits)
        return y
    dots = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dot = dots.get(x.dtype, tl.float32) if x.is_cuda else tl.float32
    grid = triton.cdiv(rows, _GEMM_ROWS), triton.cdiv(batch, _VECTORS)
    constants = {
        "HALF": half,
        "BITS": bits,
        "DOT": dot,
        "ROWS": _GEMM_ROWS,
        "VECTORS": _VECTORS,
    }
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, not on that of its tensors
        gemm_kernel[grid](x, tiles, flags, y, batch, *weights, strips, **constants)
    return y
