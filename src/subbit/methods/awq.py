"""AWQ: activation-aware weight quantization (Lin et al., 2023)."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from subbit.codes import CompressedLinear
from subbit.linalg import error_energy
from subbit.methods.base import LinearStats, Method
from subbit.methods.grids import GridOptions, round_linear

__all__ = ["AWQ", "AWQOptions"]

_RANGE = 1e-4  # input magnitudes below this share of the largest count as this share


class AWQOptions(GridOptions):
    """Options of AWQ.

    Attributes:
        candidates: exponents tried, evenly spaced from 0 (no scaling) up to 1, without it.
    """

    candidates: int = Field(20, ge=1)


class AWQ(Method):
    """Scale up the columns with large inputs, round to nearest, scale down again.

    `W_hat = Q(W diag(s)) diag(s)^-1` with `s = a^alpha`, a the input magnitude of each column,
    alpha searched over [0, 1) for the smallest output error (equations 4 and 5). Two departures:
    the paper's a is mean |x|, ours the root mean square, `sqrt(diag H / tokens)`, since H is what
    is kept of the inputs; and `diag(s)^-1`, which the paper folds into the layer before, is stored
    with the linear as its column scale. Weight clipping, a later addition of the authors' code, is
    left out. alpha = 0 is RTN.
    """

    name = "awq"
    paper = "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
    year = 2023
    summary = "columns scaled by a power of their inputs' magnitude, then round to nearest"
    nm_use = "none"
    Opt = AWQOptions
    options: AWQOptions

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        count = self.options.candidates
        W = W.masked_fill(stats.H.diagonal() <= 0, 0.0)  # they must not widen a grid
        size = self.settings.blocksize if self.options.group == "block" else W.shape[1]
        best, least = None, float("inf")
        for i in range(count):
            alpha = i / count
            scale = _column_scale(stats, alpha)
            candidate = _round_scaled(W, scale, size, self.options.bits, {"alpha": alpha})
            energy = error_energy(W - candidate.dequantize(), stats.H)
            if best is None or energy < least:
                best, least = candidate, energy
        return best


def _column_scale(stats: LinearStats, alpha: float) -> Tensor:
    """`1 / s` as it is stored, float16 `(cols,)`, its extremes the same factor from 1."""
    magnitude = (stats.H.diagonal().clamp_min(0) / stats.tokens).sqrt()
    largest = magnitude.max()
    if not largest > 0:
        return torch.ones_like(magnitude).half()
    s = (magnitude / largest).clamp_min(_RANGE) ** alpha
    return ((s.max() * s.min()).sqrt() / s).half()


def _round_scaled(
    W: Tensor, column_scale: Tensor, size: int, bits: int, record: dict[str, float]
) -> CompressedLinear:
    linear = round_linear(W / column_scale.float(), size, bits)
    return replace(linear, column_scale=column_scale, record=record)
