"""Salient columns: which columns of a block get a second sign plane (BiLLM, STBLLM Alg. 2)."""

import torch
from torch import Tensor

__all__ = ["search_salient"]


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
