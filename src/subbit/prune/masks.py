"""N:M masks and the order in which a group loses its elements. N = kept of every M."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["keep_mask", "ranks_in_groups"]

_AT_ONCE = 1 << 23  # comparisons of two scores that are held at a time


def ranks_in_groups(scores: Tensor, m: int) -> Tensor:
    """Rank the scores inside every group of `m` consecutive columns; 0 = pruned first.

    The weights with rank >= k are what the sub-masks 1..k leave (PBS2P Eq. 3). Equal scores:
    the left one goes first. If `cols % m != 0` the last group is padded with columns that go
    before all others, so that it keeps `min(N, cols % m)`.

    Args:
        scores: float `(rows, cols)`, finite.

    Returns:
        uint8 `(rows, cols)` in 0..m-1.
    """
    step = max(1, _AT_ONCE // (m * max(scores.shape[1], 1)))
    if len(scores) <= step:
        return _ranks(scores, m)
    return torch.cat([_ranks(part, m) for part in scores.split(step)])


def _ranks(scores: Tensor, m: int) -> Tensor:
    """The ranks of some rows: every score is compared with all of its group."""
    rows, cols = scores.shape
    padding = -cols % m
    groups = F.pad(scores, (0, padding), value=-torch.inf).view(rows, -1, m)
    before = torch.ones(m, m, dtype=torch.bool, device=scores.device).tril(-1)  # j left of i
    mine, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
    lower = (other < mine) | ((other == mine) & before)
    return lower.sum(-1, dtype=torch.uint8).view(rows, -1)[:, :cols]


def keep_mask(scores: Tensor, nm: tuple[int, int]) -> Tensor:
    """Keep the N highest scores of every M consecutive columns; bool `(rows, cols)`."""
    n, m = nm
    return ranks_in_groups(scores, m) >= m - n
