"""Which weights a score keeps: N of every M, single weights, or whole columns."""

import torch
from torch import Tensor

from subbit.errors import RecipeError, nearest
from subbit.prune.masks import keep_mask, ranks_in_groups

__all__ = ["PRUNING", "kept_count", "pruning_ranks", "select", "structure"]

PRUNING = ("semi-structured", "unstructured", "structured")


def kept_count(count: int, nm: tuple[int, int]) -> int:
    """How many of `count` are kept at the ratio N / M: rounded, at least one."""
    n, m = nm
    return max(1, (2 * count * n + m) // (2 * m))


def select(
    scores: Tensor, nm: tuple[int, int], pruning: str = "semi-structured", *, by_row: bool = True
) -> Tensor:
    """Keep the highest scores at the ratio N / M; of equal ones the left goes first.

    Args:
        scores: float `(rows, cols)`, finite.
        nm: `(N, M)`.
        pruning: "semi-structured" keeps N of every M consecutive columns, "unstructured" any
            weights, "structured" the columns of the highest sums.
        by_row: unstructured: the same number in every row, or the highest of the whole matrix.

    Returns:
        bool `(rows, cols)`.

    Raises:
        RecipeError: unknown type of pruning.
    """
    if pruning == "semi-structured":
        return keep_mask(scores, nm)
    if pruning == "structured":
        return _highest(scores.sum(0, dtype=torch.float64)[None], nm).expand_as(scores)
    if pruning == "unstructured":
        return _highest(scores if by_row else scores.reshape(1, -1), nm).view_as(scores)
    raise RecipeError(f"unknown pruning '{pruning}'{nearest(pruning, PRUNING)}")


def pruning_ranks(
    scores: Tensor,
    nm: tuple[int, int],
    pruning: str = "semi-structured",
    *,
    by_row: bool = False,
) -> Tensor:
    """When every weight goes, of M - 1 steps each of which prunes one M-th of them.

    The weights with rank >= k are what the sub-masks 1..k leave (PBS2P Eq. 3): what `select` keeps
    at (M - k) / M.

    Args:
        scores: float `(rows, cols)`, finite.
        nm: `(N, M)`; the ranks depend on M alone.
        pruning, by_row: as in `select`.

    Returns:
        uint8 `(rows, cols)` in 0..M-1.
    """
    m = nm[1]
    if pruning == "semi-structured":
        return ranks_in_groups(scores, m)
    ranks = torch.zeros_like(scores, dtype=torch.uint8)
    for step in range(1, m):
        ranks += select(scores, (m - step, m), pruning, by_row=by_row)
    return ranks


def structure(nm: tuple[int, int] | None, pruning: str) -> tuple[tuple[int, int] | None, bool]:
    """What a mask may be relied on for: its N:M or None, and whether whole columns are pruned."""
    semi = pruning == "semi-structured"
    return nm if semi else None, nm is not None and pruning == "structured"


def _highest(scores: Tensor, nm: tuple[int, int]) -> Tensor:
    """The highest of every row."""
    order = scores.argsort(dim=-1, stable=True)
    count = scores.shape[-1]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., count - kept_count(count, nm) :], True)
