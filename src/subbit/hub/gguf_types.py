"""Which GGUF type holds a packed linear without loss, and its bytes.

A type is taken only if gguf's own decoder gives back every weight bit for bit. TQ1_0 holds one
magnitude with its sign, and 0, for each 256 columns; Q8_0 holds whole multiples of one float16 step
for each 32: grids, and int8 levels whose scale is a float16 too. Q1_0 would hold one magnitude
without 0, but gguf 0.19 cannot decode it.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from subbit.codes import Compressed, CompressedLinear

__all__ = ["lossless"]

Type = GGMLQuantizationType
_BLOCK = 32  # columns of one Q8_0 step


def lossless(linear: Compressed) -> tuple[Type, np.ndarray] | None:
    """The smallest type that holds these weights, and its bytes.

    Returns:
        The type and uint8 `(rows, bytes of a row)`; None if no type holds them.
    """
    W = linear.dequantize()
    dense = W.numpy()
    wide = dense.shape[1] % GGML_QUANT_SIZES[Type.TQ1_0][0] == 0
    if wide and len(np.unique(np.abs(dense[0, :256]))) <= 2:
        data = quants.quantize(dense, Type.TQ1_0)
        if _same(data, Type.TQ1_0, dense):
            return Type.TQ1_0, data
    data = _q8_0(linear, W)
    if data is not None and _same(data, Type.Q8_0, dense):
        return Type.Q8_0, data
    return None


def _same(data: np.ndarray, kind: Type, dense: np.ndarray) -> bool:
    return np.array_equal(quants.dequantize(data, kind).reshape(dense.shape), dense)


def _q8_0(linear: Compressed, W: Tensor) -> np.ndarray | None:
    """W as whole multiples of the steps; what does not fit shows when it is decoded."""
    rows, cols = W.shape
    step = _steps(linear, cols)
    if step is None:
        return None
    wide = step.float().repeat_interleave(_BLOCK, 1)
    count = torch.where(wide == 0, 0, W / wide).round().clamp(-128, 127).to(torch.int8)
    blocks = torch.cat(
        (
            step.contiguous().view(torch.uint8).view(rows, -1, 2),
            count.view(torch.uint8).view(rows, -1, _BLOCK),
        ),
        -1,
    )
    return blocks.view(rows, -1).numpy()


def _steps(linear: Compressed, cols: int) -> Tensor | None:
    """The step of each 32 columns, float16 `(rows, cols / 32)`, where there is one."""
    if not isinstance(linear, CompressedLinear) or cols % _BLOCK:
        return None
    levels, groups = linear.levels, linear.levels.params.shape[1]
    if groups > 1 and linear.group_size % _BLOCK:
        return None
    if levels.scale is not None:
        step = levels.scale.half().expand(-1, groups)
    elif levels.kind == "grid":
        step = levels.params[..., 0]
    else:
        return None
    group = torch.arange(0, cols, _BLOCK) // linear.group_size
    return step[:, group.clamp(max=groups - 1)]
