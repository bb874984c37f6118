"""Split points: the magnitudes at which the ordinary weights of a block part into groups."""

import torch
from torch import Tensor

__all__ = ["label_groups", "search_splits"]


def search_splits(
    W: Tensor, support: Tensor, *, points: int, grid: tuple[float, float, int], sigma: float
) -> Tensor:
    """Find the split points of a block (STBLLM Alg. 2, NonSalientAwareQuant).

    Candidates are `p1 = i * max|W|` for i in `linspace(*grid)` with `p2 = sigma p1`,
    `p3 = sigma p2` ..., left out where the last one passes 0.9 max|W|. All candidates are measured
    at once from cumulative sums: the squared error when every group of a row is binarised to
    +-mean|w|, summed over rows.

    Args:
        W: float32 `(rows, b)`.
        support: bool `(rows, b)`: the weights that count.
        points: number of split points (groups - 1); 0 = none.
        grid: first and last i, and how many.
        sigma: ratio of consecutive split points.

    Returns:
        float32 `(points,)`, ascending. Where no candidate is allowed, the smallest one.
    """
    magnitude = W.abs() * support
    peak = magnitude.max()
    if points == 0 or peak == 0:
        return torch.zeros(points, device=W.device)
    first, last, steps = grid
    p1 = torch.linspace(first, last, int(steps), dtype=torch.float64)
    ratios = torch.tensor([float(sigma) ** j for j in range(points)], dtype=torch.float64)
    candidates = p1[:, None] * ratios  # (steps, points)
    allowed = candidates[candidates[:, -1] <= 0.9]
    candidates = (allowed if len(allowed) else candidates[:1]).float().to(W.device) * peak
    sums, counts = _cumulative(magnitude, support, candidates)
    explained = (sums.square() / counts.clamp_min(1)).sum((0, 2), dtype=torch.float64)
    return candidates[int(explained.argmax())]


def label_groups(W: Tensor, splits: Tensor) -> Tensor:
    """Group of every weight by magnitude: 0 = smallest; uint8, shape of W. `|w| = p` goes below."""
    return torch.bucketize(W.abs(), splits).to(torch.uint8)


def _cumulative(magnitude: Tensor, support: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |w| and counts per row, candidate and group: `(rows, candidates, points + 1)`."""
    rows = magnitude.shape[0]
    edges, position = candidates.flatten().unique(return_inverse=True)
    bins = torch.bucketize(magnitude, edges)  # 0..len(edges)
    sums = magnitude.new_zeros(rows, len(edges) + 1).scatter_add_(1, bins, magnitude).cumsum(1)
    ones = support.to(magnitude.dtype)
    counts = magnitude.new_zeros(rows, len(edges) + 1).scatter_add_(1, bins, ones).cumsum(1)
    position = position.view(candidates.shape)

    def between(cumulative: Tensor) -> Tensor:
        upto = torch.cat(
            (cumulative[:, position], cumulative[:, -1:, None].expand(-1, len(position), 1)), -1
        )
        return torch.diff(upto, dim=-1, prepend=torch.zeros_like(upto[..., :1]))

    return between(sums), between(counts)
