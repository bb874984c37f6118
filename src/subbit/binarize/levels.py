"""Free levels: a handful of values a row, wherever they fit best (weighted 1-D k-means)."""

import torch
from torch import Tensor

__all__ = ["fit_levels"]


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


def _nearest(W: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level; between ascending neighbours the middle decides."""
    ascending, order = levels.sort(1)
    middles = (ascending[:, 1:] + ascending[:, :-1]) / 2
    index = torch.zeros_like(W, dtype=torch.int64)
    for middle in middles.unbind(1):  # a handful: cheaper than a binary search in every row
        index += middle[:, None] < W
    return order.gather(1, index)
