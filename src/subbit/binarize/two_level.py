"""Unweighted two-level fits of each row: alternating (ARB) and exact."""

import torch
from torch import Tensor

from subbit.binarize.arb import refine
from subbit.binarize.spbo import binarize_part

__all__ = ["fit_alternating", "fit_exact"]


def fit_alternating(W: Tensor, support: Tensor, iterations: int = 50) -> Tensor:
    """Binarise rows to `mu +- alpha`, refining mu, alpha and the signs in turn (ARB-LLM).

    A local optimum of the squared error over the support.

    Args:
        W: float32 `(rows, b)`; support: bool `(rows, b)`.

    Returns:
        The fitted matrix, 0 off the support.
    """
    return refine(W, binarize_part(W, support, 1), iterations).dense()


def fit_exact(W: Tensor, support: Tensor) -> Tensor:
    """Binarise rows to two levels with the least squared error over the support.

    One-dimensional 2-means: the optimum is a threshold, so one scan over the sorted weights with
    cumulative sums finds it.

    Args:
        W: float32 `(rows, b)`; support: bool `(rows, b)`.

    Returns:
        The fitted matrix, 0 off the support.
    """
    order = torch.argsort(torch.where(support, W, torch.inf), dim=-1, stable=True)
    kept = support.gather(-1, order)
    total_below = (W * support).gather(-1, order).cumsum(-1)
    below = kept.cumsum(-1)
    total, n = total_below[:, -1:], below[:, -1:]
    low = total_below / below.clamp_min(1)
    high = (total - total_below) / (n - below).clamp_min(1)
    explained = total_below * low + (total - total_below) * high
    cut = explained.argmax(-1, keepdim=True)
    is_low = torch.arange(W.shape[1], device=W.device) <= cut
    fitted = torch.where(is_low, low.gather(-1, cut), high.gather(-1, cut))
    return torch.zeros_like(W).scatter(-1, order, fitted) * support
