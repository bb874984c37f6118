"""A handful of values a row where they fit best: free ones, or one scale."""

import torch
from torch import Tensor

from subbit.binarize import descent

__all__ = ["fit_levels", "fit_scale"]

_ROWS, _COSTS = 64, 2**20  # at most at a time without the compiled form: costs are (rows, b, b)


def fit_levels(W: Tensor, keep: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fit `count` levels to the kept weights of every row: the ones of least squared error.

    The optimum of weighted k-means in one dimension: clusters are runs of the sorted weights, and
    a dynamic programme over where each ends finds the best. Descent that starts from here ends
    lower than from a local optimum (records/level_start.txt).

    Args:
        W: float32 `(rows, b)`.
        keep: bool `(rows, b)`; a row may be empty (its levels are 0).
        count: levels a row.
        weight: positive `(b,)`: what a squared error in each column costs.

    Returns:
        Codes int64 `(rows, b)` (0 = pruned, c = level c - 1) and levels float32 `(rows, count)`,
        ascending.
    """
    ascending, order = torch.where(keep, W, torch.inf).sort(dim=1, stable=True)
    ascending = ascending.masked_fill(ascending.isinf(), 0.0)
    mass, kept = weight[order], keep.sum(1)
    if descent.available(keep.T, 1, [count]):
        levels = descent.exact_levels(ascending, mass, kept, count)
    else:
        rows = max(1, min(_ROWS, _COSTS // W.shape[1] ** 2))
        levels = torch.cat(
            [
                _exact(w, m * (torch.arange(w.shape[1], device=w.device) < k[:, None]), k, count)
                for w, m, k in zip(ascending.split(rows), mass.split(rows), kept.split(rows))
            ]
        )
    return (_nearest(W, levels) + 1) * keep, levels


def _exact(ascending: Tensor, mass: Tensor, kept: Tensor, count: int) -> Tensor:
    """As `descent.exact_levels`; `mass` is 0 beyond the kept weights."""
    rows = len(ascending)
    w, mass = ascending.double(), mass.double()
    sums = [torch.nn.functional.pad((mass * w**p).cumsum(1), (1, 0)) for p in range(3)]
    m, first, second = (s[:, None] - s[:, :, None] for s in sums)  # [i, j]: weights i..j-1
    cost = (second - first.square() / m.clamp_min(1e-300)).clamp_min(0)
    cost = cost.masked_fill(torch.ones_like(cost[0], dtype=torch.bool).tril(), torch.inf)
    best, cuts = cost[:, 0], []  # best[j]: error of the first j weights
    for _ in range(count - 1):
        best, cut = (best[:, :, None] + cost).min(1)
        cuts.append(cut)
    # a row with fewer weights than levels has fewer clusters, and repeats the last level
    clusters = kept.clamp(max=count)
    levels, end = w.new_zeros(rows, count), kept.long()[:, None]
    for k in reversed(range(count)):
        used = (k < clusters)[:, None]
        start = cuts[k - 1].gather(1, end) if k else torch.zeros_like(end)
        start = torch.where(used, start, end)
        total, pull = (s.gather(1, end) - s.gather(1, start) for s in sums[:2])
        levels[:, k : k + 1] = torch.where(used, pull / total.clamp_min(1e-300), 0.0)
        end = start
    last = levels.gather(1, (clusters.long() - 1).clamp_min(0)[:, None])
    beyond = torch.arange(count, device=w.device) >= clusters[:, None]
    return torch.where(beyond, last, levels).float()


def fit_scale(
    W: Tensor, keep: Tensor, zero: bool, weight: Tensor, iterations: int = 8
) -> tuple[Tensor, Tensor]:
    """Fit one alpha a row: levels -alpha and alpha or, with `zero`, -alpha, 0 and alpha.

    Args:
        W, keep, weight: as in `fit_levels`.
        zero: whether 0 is a level.
        iterations: of Lloyd's algorithm, with a zero.

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
