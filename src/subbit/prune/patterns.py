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
    values = _compared(scores, pruning, by_row)
    count = values.shape[-1]
    order = values.argsort(dim=-1, stable=True)[..., count - kept_count(count, nm) :]
    mask = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)
    return _spread(mask, scores)


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
    values = _compared(scores, pruning, by_row)
    count = values.shape[-1]
    left = [count - kept_count(count, (m - step, m)) for step in range(1, m)]
    # the score in place p of the ascending order outlasts the steps that prune p of them at most
    place = torch.arange(count, device=scores.device)
    step = torch.bucketize(place, torch.tensor(left, device=scores.device), right=True)
    ranks = torch.empty_like(values, dtype=torch.uint8)
    order = values.argsort(dim=-1, stable=True)
    ranks.scatter_(-1, order, step.to(torch.uint8).expand_as(order))
    return _spread(ranks, scores)


def structure(nm: tuple[int, int] | None, pruning: str) -> tuple[tuple[int, int] | None, bool]:
    """What a mask may be relied on for: its N:M or None, and whether whole columns are pruned."""
    semi = pruning == "semi-structured"
    return nm if semi else None, nm is not None and pruning == "structured"


def _compared(scores: Tensor, pruning: str, by_row: bool) -> Tensor:
    """What is compared along the last dimension: column sums, or the scores of a row or of all."""
    if pruning == "structured":
        return scores.sum(0, dtype=torch.float64)[None]
    if pruning == "unstructured":
        return scores if by_row else scores.reshape(1, -1)
    raise RecipeError(f"unknown pruning '{pruning}'{nearest(pruning, PRUNING)}")


def _spread(found: Tensor, scores: Tensor) -> Tensor:
    """What was found for `_compared`, for every weight `(rows, cols)`."""
    columns = found.numel() < scores.numel()
    return found.expand_as(scores) if columns else found.view_as(scores)
