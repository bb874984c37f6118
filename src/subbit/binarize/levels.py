"""A handful of values a row where they fit best: free ones (weighted 1-D k-means), or one scale."""

import torch
from torch import Tensor

__all__ = ["fit_levels", "fit_scale"]


def fit_levels(
    W: Tensor, keep: Tensor, count: int, weight: Tensor, iterations: int = 8
) -> tuple[Tensor, Tensor]:
    """Fit `count` levels to the kept weights of every row (Lloyd's algorithm from quantiles).

    Args:
        W: float32 `(rows, b)`.
        keep: bool `(rows, b)`; a row may be empty (its levels are 0).
        count: levels a row.
        weight: positive `(b,)`: what a squared error in each column costs.

    Returns:
        Codes int64 `(rows, b)` (0 = pruned, c = level c - 1) and levels float32 `(rows, count)`.
    """
    kept = keep.sum(1, keepdim=True)
    ascending = torch.where(keep, W, torch.inf).sort(1).values
    middle = (torch.arange(count, device=W.device) + 0.5) / count
    position = torch.minimum((middle * kept).long(), (kept - 1).clamp_min(0))
    levels = ascending.gather(1, position).masked_fill(kept == 0, 0.0)
    mass = keep * weight
    for _ in range(iterations):
        nearest = _nearest(W, levels)
        total = torch.zeros_like(levels).scatter_add_(1, nearest, mass)
        pull = torch.zeros_like(levels).scatter_add_(1, nearest, mass * W)
        levels = torch.where(total > 0, pull / total.clamp_min(1e-30), levels)
    return (_nearest(W, levels) + 1) * keep, levels


def fit_scale(
    W: Tensor, keep: Tensor, zero: bool, weight: Tensor, iterations: int = 8
) -> tuple[Tensor, Tensor]:
    """Fit one alpha a row: levels -alpha and alpha or, with `zero`, -alpha, 0 and alpha.

    Args:
        W, keep, weight, iterations: as in `fit_levels`.

    Returns:
        Codes int64 `(rows, b)`, 0 = pruned, then the levels ascending, and alpha float32
        `(rows, 1)`.
    """
    size, mass = W.abs(), keep * weight
    alpha = torch.zeros_like(W[:, :1])
    for _ in range(1 + iterations * zero):
        counted = mass * (size > alpha / 2) if zero else mass  # nearer to +-alpha than to 0
        total = counted.sum(1, keepdim=True)
        pull = (counted * size).sum(1, keepdim=True)
        alpha = torch.where(total > 0, pull / total.clamp_min(1e-30), alpha)
    positive = (alpha / 2 if zero else 0) < W
    codes = 1 + positive.long() + ((-alpha / 2 < W).long() if zero else 0)
    return codes * keep, alpha


def _nearest(W: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level; between ascending neighbours the middle decides."""
    ascending, order = levels.sort(1)
    middles = (ascending[:, 1:] + ascending[:, :-1]) / 2
    index = torch.zeros_like(W, dtype=torch.int64)
    for middle in middles.unbind(1):  # a handful: cheaper than a binary search in every row
        index += middle[:, None] < W
    return order.gather(1, index)
