"""k-bit grids: 2^k evenly spaced levels a row and group, asymmetric, as in RTN, GPTQ and AWQ."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable
from subbit.methods.base import Options

__all__ = ["GridOptions", "fit_grid", "grid_linear", "grid_values", "round_linear", "round_to_grid"]


class GridOptions(Options):
    """Options of the methods that round to a grid.

    Attributes:
        bits: levels are 2^bits.
        group: which weights of a row share a scale and a zero: those of a block of `blocksize`
            columns, or all.
    """

    bits: int = Field(2, ge=1, le=4)
    group: Literal["block", "row"] = "block"


def fit_grid(W: Tensor, levels: int) -> Tensor:
    """The grid from the smallest to the largest weight of each row, 0 among them.

    Args:
        W: float32 `(rows, b)`, the weights that share a grid.
        levels: how many levels it has.

    Returns:
        Scale and zero as they are stored, float16 `(rows, 2)`; scale 0 where all weights are 0 (or
        too small for float16).
    """
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    top = levels - 1
    scale = ((high - low) / top).half()
    zero = (-low / scale.float()).nan_to_num(0, 0, 0).round().clamp(0, top)
    return torch.stack((scale, zero.half()), -1)


def round_to_grid(w: Tensor, params: Tensor, levels: int) -> Tensor:
    """The nearest level's index, float32 of the shape of w.

    Args:
        w: float32 `(rows,)` or `(rows, b)`.
        params: float16 `(rows, 2)` of `fit_grid`; levels: the same as there.
    """
    scale, zero = _parts(w, params)
    return ((w / scale).nan_to_num(0, 0, 0).round() + zero).clamp(0, levels - 1)


def grid_values(index: Tensor, params: Tensor) -> Tensor:
    """What level indices mean, float32 of their shape; see `round_to_grid`."""
    scale, zero = _parts(index, params)
    return (index - zero) * scale


def _parts(like: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero = params.float().unbind(-1)
    return (scale, zero) if like.dim() == 1 else (scale[:, None], zero[:, None])


def grid_linear(
    index: Tensor, params: list[Tensor], group_size: int, bits: int, record: dict[str, Any]
) -> CompressedLinear:
    """Put the neutral result together.

    Args:
        index: level indices, float32 `(rows, cols)`.
        params: float16 `(rows, 2)` of each group of `group_size` columns, left to right.
    """
    table = LevelTable("grid", 2**bits, torch.stack(params, 1))
    return CompressedLinear((index + 1).to(torch.uint8), table, group_size, record=record)


def round_linear(W: Tensor, group_size: int, bits: int) -> CompressedLinear:
    """Round every weight `(rows, cols)` to the nearest level of its group's own grid."""
    parts = W.split(group_size, 1)
    params = [fit_grid(part, 2**bits) for part in parts]
    index = [round_to_grid(part, p, 2**bits) for part, p in zip(parts, params, strict=True)]
    return grid_linear(torch.cat(index, 1), params, group_size, bits, {})
