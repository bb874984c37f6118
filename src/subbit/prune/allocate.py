"""Coarse stage: how many of every M weights each decoder block keeps."""

from collections.abc import Sequence
from math import floor

from subbit.errors import RecipeError, nearest

__all__ = ["ALLOCATIONS", "allocate", "mean_kept"]

ALLOCATIONS = ("layer_importance", "uniform")


def allocate(
    similarities: Sequence[float],
    sizes: Sequence[int],
    nm: tuple[int, int],
    *,
    allocation: str = "layer_importance",
    n_high: int = 1,
    n_low: int = 1,
) -> list[int]:
    """Give every decoder block its N (PBS2P Eq. 7-8).

    Blocks are ranked by importance = 1 / similarity of hidden state in and out, rank 1 the most
    important; N falls linearly from `N + n_high` to `N - n_low` over the ranks, rounded half up,
    and stays within 1..M. If rounding or unequal sizes lift the mean above N, the least important
    blocks that still can give one up until it does not.

    Args:
        similarities: mean cosine similarity of each block's input and output.
        sizes: compressed weights of each block.
        nm: the target `(N, M)`.
    """
    n, m = nm
    if allocation not in ALLOCATIONS:
        raise RecipeError(
            f"unknown coarse.allocation '{allocation}'{nearest(allocation, ALLOCATIONS)}"
        )
    if allocation == "uniform":
        return [n] * len(sizes)
    count = len(similarities)
    high, low = min(n + n_high, m), max(n - n_low, 1)
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


def mean_kept(kept: Sequence[int], sizes: Sequence[int]) -> float:
    """The weight-averaged N of an allocation."""
    return sum(k * s for k, s in zip(kept, sizes)) / sum(sizes)
