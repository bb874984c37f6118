"""Salient columns: which columns of a block get a second sign plane (BiLLM, STBLLM Alg. 2)."""

import torch
from torch import Tensor

__all__ = ["column_limit", "search_salient", "search_salient_scores"]

_COLUMNS = 128  # of the papers' blocks; the same share of larger, smaller and last ones
_STRIPE = 64  # rows whose binarisations for all counts are held at once


def column_limit(most: int, width: int) -> int:
    """How many salient columns a block of `width` columns may have: `most` of every 128."""
    return most * width // _COLUMNS


def search_salient(W: Tensor, score: Tensor, support: Tensor, limit: int) -> Tensor:
    """Choose the salient columns of a block.

    Columns are taken in descending order of their summed score. Every count 1..limit is tried at
    once: the salient and the other weights of a row are each binarised to +-mean|w|, and the count
    with the smallest squared error wins (the first one on a tie).

    Args:
        W: float32 `(rows, b)`.
        score: importance, `(rows, b)`.
        support: bool `(rows, b)`: the weights that count.
        limit: most salient columns allowed; 0 = none.

    Returns:
        bool `(b,)`.
    """
    cols = W.shape[1]
    salient = torch.zeros(cols, dtype=torch.bool, device=W.device)
    limit = min(limit, cols - 1)
    if limit < 1:
        return salient
    order = torch.argsort((score * support).sum(0), descending=True, stable=True)
    magnitude = (W.abs() * support)[:, order].cumsum(1)  # (rows, b)
    count = support[:, order].cumsum(1)
    total, n = magnitude[:, -1:], count[:, -1:]
    head, k = magnitude[:, :limit], count[:, :limit]
    # squared error = const - sum over parts of (sum |w|)^2 / count
    explained = head.square() / k.clamp_min(1) + (total - head).square() / (n - k).clamp_min(1)
    best = int(explained.sum(0, dtype=torch.float64).argmax()) + 1
    salient[order[:best]] = True
    return salient


def search_salient_scores(score: Tensor, limit: int) -> Tensor:
    """Choose the salient columns of a block as published code does: on the scores alone.

    Counts 1..limit are tried as in `search_salient`, but what is binarised is the score matrix
    itself, the salient and the other columns alike in two planes, each pass with a mean.

    Args:
        score: importance, float32 `(rows, b)`, >= 0.
        limit: most salient columns allowed; 0 = none.

    Returns:
        bool `(b,)`.
    """
    cols = score.shape[1]
    limit = min(limit, cols - 1)
    if limit < 1:
        return torch.zeros(cols, dtype=torch.bool, device=score.device)
    order = torch.argsort(score.sum(0), descending=True, stable=True)
    head = torch.ones(limit, cols, dtype=score.dtype, device=score.device).tril().unsqueeze(1)
    explained = torch.zeros(limit, dtype=torch.float64, device=score.device)
    for rows in score[:, order].split(_STRIPE):
        explained += _explained(rows[:, :limit], head[..., :limit])
        explained += _explained(rows, 1 - head)
    salient = torch.zeros(cols, dtype=torch.bool, device=score.device)
    salient[order[: int(explained.argmax()) + 1]] = True
    return salient


def _explained(values: Tensor, support: Tensor) -> Tensor:
    """Squares that binarising in two planes takes away, summed over rows, float64 `(counts,)`.

    A pass with mean m and mean magnitude a takes away `n (m^2 + a^2)` of a row's n values.

    Args:
        values: `(rows, b)`; support: 0 or 1, `(counts, 1, b)`.
    """
    count = support.sum(-1)  # (counts, 1)
    left = values * support
    total = torch.zeros(len(support), dtype=torch.float64, device=values.device)
    for last in (False, True):
        mean = left.sum(-1) / count
        left = torch.addcmul(left, mean.unsqueeze(-1), support, value=-1)
        alpha = left.abs().sum(-1) / count
        total += (count * (mean.square() + alpha.square())).sum(-1, dtype=torch.float64)
        if not last:
            left = torch.addcmul(left, alpha.unsqueeze(-1) * support, left.sign(), value=-1)
    return total
