"""Coarse stage: how many of every M weights each decoder block keeps."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise
from math import cos, floor, pi

from subbit.errors import RecipeError, nearest

__all__ = ["ALLOCATIONS", "allocate", "allocate_measured", "mean_kept"]

ALLOCATIONS = ("layer_importance", "relative_importance", "sin", "uniform")


def allocate(
    similarities: Sequence[float],
    sizes: Sequence[int],
    nm: tuple[int, int],
    *,
    allocation: str = "layer_importance",
    n_high: int = 1,
    n_low: int = 1,
    norms: Sequence[float] = (),
) -> list[int]:
    """Give every decoder block its N, within 1..M and on average at most the target.

    - "layer_importance" (PBS2P Eq. 7-8): see `_by_rank`.
    - "relative_importance" (STBLLM 3.3): `N_i / M = a_i + (1 - a_i) R` with a_i the block's share
      of all norms and R = N / M. As printed every block gets more than R; the ratios are scaled
      down to the budget.
    - "sin" (STBLLM Table 6): half a wave over the depth, from `N + n_high` at the first block
      down to `N - n_low` at the last.
    - "uniform": N everywhere.

    With N = M nothing is pruned anywhere.

    Args:
        similarities: mean cosine similarity of each block's input and output; of layer importance.
        sizes: compressed weights of each block.
        nm: the target `(N, M)`.
        n_high, n_low: of layer importance and sin: how far N may go up and down.
        norms: L2 norm of each block's weights; of relative importance.
    """
    n, m = nm
    if allocation not in ALLOCATIONS:
        raise RecipeError(
            f"unknown coarse.allocation '{allocation}'{nearest(allocation, ALLOCATIONS)}"
        )
    if allocation == "uniform" or n == m:
        return [n] * len(sizes)
    high, low = min(n + n_high, m), max(n - n_low, 1)
    if allocation == "layer_importance":
        return _by_rank(similarities, sizes, n, high, low)
    if allocation == "sin":
        middle, swing, last = (high + low) / 2, (high - low) / 2, max(len(sizes) - 1, 1)
        wave = [middle + swing * cos(pi * i / last) for i in range(len(sizes))]
        return _apportion(wave if len(sizes) > 1 else [n], sizes, nm)
    total = sum(norms) or 1.0
    ratios = [norm / total + (1 - norm / total) * n / m for norm in norms]
    return _apportion([m * ratio for ratio in ratios], sizes, nm)


def allocate_measured(
    damages: Sequence[float],
    losses: Sequence[float],
    sizes: Sequence[int],
    nm: tuple[int, int],
    *,
    n_high: int,
    n_low: int,
) -> list[int]:
    """Give every linear its N so that the sum of their damages is least within the budget.

    A linear that keeps n of M is taken to do `damage * losses[n - 1] / losses[N - 1]`. Every linear
    starts with the fewest; then the step that saves most damage for each weight it costs is taken
    as long as the mean stays at most N: the answer of a small knapsack, but for its last items. A
    linear whose next step is too large for what is left takes no more.

    Args:
        damages: what compressing each linear at N:M alone does to the model.
        losses: loss of a linear that keeps 1, 2, ... M of M; made convex and falling where it is
            not.
        sizes: weights of each linear.
        nm: the target `(N, M)`.
        n_high, n_low: how far N may go up and down.
    """
    n, m = nm
    high, low = min(n + n_high, m), max(n - n_low, 1)
    savings = _savings(losses[low - 1 : high])
    base = losses[n - 1] or 1.0
    kept, left = [low] * len(sizes), (n - low) * sum(sizes)

    def step(i: int) -> tuple[float, bool, int, int]:
        """The next step of linear i; those that save most for each weight sort first."""
        k = kept[i] - low
        new = k == 0 or savings[k] != savings[k - 1]  # a stretch that was begun is ended first
        return -damages[i] * savings[k] / base / sizes[i], new, k, i

    steps = [step(i) for i in range(len(sizes))] if low < high else []
    heapify(steps)
    while steps:
        i = heappop(steps)[-1]
        if sizes[i] <= left:
            kept[i], left = kept[i] + 1, left - sizes[i]
            if kept[i] < high:
                heappush(steps, step(i))
    return kept


def _savings(values: Sequence[float]) -> list[float]:
    """What each step saves along the greatest convex falling curve below some values.

    That is their lower hull, once they are made to fall: along a stretch of it every step saves the
    same.
    """
    falling = list(accumulate(values, min))
    corners: list[int] = []
    for i in range(len(falling)):
        while len(corners) > 1 and _above(falling, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    savings: list[float] = []
    for left, right in pairwise(corners):
        savings += [(falling[left] - falling[right]) / (right - left)] * (right - left)
    return savings


def _above(values: Sequence[float], left: int, middle: int, right: int) -> bool:
    """Whether a value is not below the line between two others."""
    rise = values[right] - values[left]
    return (values[middle] - values[left]) * (right - left) >= rise * (middle - left)


def mean_kept(kept: Sequence[float], sizes: Sequence[int]) -> float:
    """The weight-averaged N of an allocation."""
    return sum(k * s for k, s in zip(kept, sizes)) / sum(sizes)


def _by_rank(
    similarities: Sequence[float], sizes: Sequence[int], n: int, high: int, low: int
) -> list[int]:
    """N by rank of importance = 1 / similarity of hidden state in and out.

    Rank 1 is the most important; N falls linearly from `high` to `low` over the ranks, rounded
    half up. If rounding or unequal sizes lift the mean above N, the least important blocks that
    still can give one up until it does not.
    """
    count = len(similarities)
    # ascending similarity = descending 1 / similarity, and stays right where similarity <= 0
    by_importance = sorted(range(count), key=lambda i: (similarities[i], i))
    kept = [n] * count
    for rank, i in enumerate(by_importance):
        if count > 1:
            kept[i] = floor(high - (high - low) * rank / (count - 1) + 0.5)
    while mean_kept(kept, sizes) > n:
        i = next(i for i in reversed(by_importance) if kept[i] > low)
        kept[i] -= 1
    return kept


def _apportion(wanted: Sequence[float], sizes: Sequence[int], nm: tuple[int, int]) -> list[int]:
    """Whole numbers near the wanted ones, scaled to the budget where these exceed it.

    All are rounded down; then those that lost most get one more, as long as the mean allows it.
    """
    n, m = nm
    scale = min(1.0, n / mean_kept(wanted, sizes))
    wanted = [min(max(scale * x, 1.0), float(m)) for x in wanted]
    kept = [floor(x + 1e-9) for x in wanted]
    while mean_kept(kept, sizes) > n:  # where some were lifted to 1
        kept[kept.index(max(kept))] -= 1
    for i in sorted(range(len(kept)), key=lambda i: kept[i] - wanted[i]):
        kept[i] += 1
        if kept[i] > m or mean_kept(kept, sizes) > n:
            kept[i] -= 1
    return kept
