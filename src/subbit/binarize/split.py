"""Split points: the magnitudes at which the ordinary weights of a block part into groups."""

import torch
from torch import Tensor

from subbit.binarize.intervals import SortedRows
from subbit.binarize.spbo import binarize_part

__all__ = [
    "label_groups",
    "peak_candidates",
    "quantile_candidates",
    "search_splits",
    "search_splits_on_inputs",
]

_INTERVALS_AT_ONCE = 1 << 19  # rows x intervals that are measured together


def peak_candidates(
    values: Tensor, support: Tensor, *, points: int, grid: tuple[float, float, int], sigma: float
) -> Tensor:
    """Candidate split points as shares of the largest value (STBLLM Alg. 2).

    `p1 = i * max` for i in `linspace(*grid)`, `p2 = sigma p1`, `p3 = sigma p2`..., left out where
    the last one passes 0.9 max; where none is allowed, the first alone. With `sigma = inf` (the
    naive search) the points are instead all ascending choices from the grid.

    Args:
        values: float32 `(rows, b)`, >= 0; support: bool `(rows, b)`.

    Returns:
        float32 `(candidates, points)`, ascending in each row.
    """
    shares = torch.linspace(grid[0], grid[1], int(grid[2]), dtype=torch.float64)
    if sigma == float("inf"):
        candidates = _choices(shares, points)
    else:
        ratios = torch.tensor([float(sigma) ** j for j in range(points)], dtype=torch.float64)
        candidates = shares[:, None] * ratios
    allowed = candidates[candidates[:, -1] <= 0.9] if points else candidates
    candidates = allowed if len(allowed) else candidates[:1]
    peak = torch.where(support, values, 0.0).max()
    return candidates.float().to(values.device) * peak


def quantile_candidates(
    values: Tensor, support: Tensor, *, points: int, grid: tuple[float, float, int], sigma: float
) -> Tensor:
    """Candidate split points as published code takes them: quantiles.

    `p1` = the quantiles `linspace(*grid)` of the values, interpolated linearly; the other points
    as in `peak_candidates`, left out where the last one passes the highest quantile.

    Args:
        values: float32 `(rows, b)`, >= 0; support: bool, broadcastable to it: whose quantiles.
    """
    shares = torch.linspace(grid[0], grid[1], int(grid[2]), dtype=torch.float32).double()
    quantiles = _quantiles(values[support.expand_as(values)], shares.to(values.device))
    if sigma == float("inf"):
        return _choices(quantiles, points)
    ratios = [float(sigma) ** j for j in range(points)]
    candidates = quantiles[:, None] * torch.tensor(ratios, device=values.device)
    allowed = candidates[candidates[:, -1] <= quantiles[-1]]
    return allowed if len(allowed) else candidates[:1]


def search_splits(
    values: Tensor, support: Tensor, candidates: Tensor, *, planes: int = 1, means: int = 0
) -> Tensor:
    """Choose the split points whose groups leave the least squared error when binarised.

    Args:
        values: float32 `(rows, b)`; >= 0 where `means` is 0.
        support: bool `(rows, b)`: the values that count.
        candidates: `(candidates, points)`, ascending in each row.
        planes, means: how a group of a row is binarised, as in `spbo.binarize_part`.

    Returns:
        float32 `(points,)`: the best candidate, the first one on a tie.
    """
    edges, position = candidates.flatten().unique(return_inverse=True)
    last = len(edges) + 1
    bounds = torch.nn.functional.pad(position.view(candidates.shape) + 1, (1, 0))
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=last)  # (candidates, points + 2)
    pairs = bounds[:, :-1] * (last + 1) + bounds[:, 1:]
    intervals, which = pairs.unique(return_inverse=True)
    lo, hi = intervals // (last + 1), intervals % (last + 1)
    explained = torch.zeros(len(intervals), dtype=torch.float64, device=values.device)
    stripe = max(1, _INTERVALS_AT_ONCE // len(intervals))
    for part, kept in zip(values.split(stripe), support.split(stripe)):
        rows = SortedRows(part, kept)
        ends = torch.nn.functional.pad(rows.upto(edges), (1, 0))
        ends = torch.cat((ends, rows.count), 1)
        explained += rows.explained(ends[:, lo], ends[:, hi], planes, means).sum(0)
    return candidates[int(explained[which].sum(1).argmax())]


def search_splits_on_inputs(
    values: Tensor, support: Tensor, candidates: Tensor, rest: Tensor, S: Tensor
) -> Tensor:
    """Choose the split points by the error `tr(R S R^T)` of the whole block (published ARB-X).

    Args:
        values: float32 `(rows, b)`; support: bool `(rows, b)`: the values that are grouped, each
            group of a row binarised in one plane with a mean.
        candidates: `(candidates, points)`, ascending in each row.
        rest: float32 `(rows, b)`: the residual off the support, 0 on it.
        S: float32 `(b, b)`.

    Returns:
        float32 `(points,)`: the best candidate, the first one on a tie.
    """

    def error(splits: Tensor) -> float:
        group = torch.arange(len(splits) + 1, device=values.device)[:, None, None]
        groups = (label_groups(values, splits) == group) & support
        R = rest + values * support - binarize_part(values, groups, 1).dense().sum(0)
        return float(((R @ S) * R).sum(-1, dtype=torch.float64).sum())

    errors = [error(splits) for splits in candidates]
    return candidates[errors.index(min(errors))]


def label_groups(values: Tensor, splits: Tensor) -> Tensor:
    """Group of every value: 0 = smallest; uint8, shape of `values`. A value at a point is below."""
    return torch.bucketize(values, splits).to(torch.uint8)


def _choices(shares: Tensor, points: int) -> Tensor:
    """All ascending choices of `points` of the shares, `(choices, points)`."""
    return torch.combinations(shares, points)


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Quantiles of all values, by linear interpolation, float32; 0 where there are no values."""
    if values.numel() == 0:
        return torch.zeros(len(shares), device=values.device)
    ordered = values.sort().values.double()
    position = shares * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below).float()
