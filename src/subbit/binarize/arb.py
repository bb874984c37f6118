"""Alternating refined binarisation (ARB-LLM, Li et al. 2025): mean, scales and signs in turn."""

import torch
from torch import Tensor

from subbit.binarize.spbo import Part

__all__ = ["nearest_signs", "refine"]


def refine(W: Tensor, part: Part, iterations: int) -> Part:
    """Refine a binarised part; one plane is ARB's first order, two its second order.

    Each iteration adds the mean of what is left to mu, fits every alpha to what the others leave,
    and lets every weight choose the nearest of its levels: none of the three raises the squared
    error over the support.

    Args:
        W: float32 `(rows, b)`.
        part: where to start (see `spbo.binarize_part`); leading dimensions are refined at once.
        iterations: 15 in the paper.
    """
    kept = part.support.to(W.dtype)
    count = kept.sum(-1).clamp_min(1)
    mu, *alphas = part.params.unbind(-1)
    signs = list(part.signs.unbind(-2))
    for _ in range(iterations):
        mu = mu + ((W - _sum(mu, alphas, signs)) * kept).sum(-1) / count
        for i, sign in enumerate(signs):
            others = _sum(mu, alphas[:i] + alphas[i + 1 :], signs[:i] + signs[i + 1 :])
            alphas[i] = (sign * (W - others)).sum(-1) / count
        centred = W - mu.unsqueeze(-1)
        signs = [s * kept for s in nearest_signs(centred, [a.unsqueeze(-1) for a in alphas])]
    return Part(part.support, torch.stack(signs, -2), torch.stack((mu, *alphas), -1))


def nearest_signs(W: Tensor, scales: list[Tensor]) -> list[Tensor]:
    """Signs B_i of +-1 for which `sum_i scales_i B_i` comes nearest to W.

    Args:
        W: float32 `(..., b)`.
        scales: one or two tensors that broadcast to W.
    """
    sign = torch.where(W >= 0, 1.0, -1.0)
    flips = [torch.where(scale < 0, -1.0, 1.0) for scale in scales]
    if len(scales) == 1:
        return [sign * flips[0]]
    # of the levels +-(u + v) and +-(u - v): the outer ones beyond the larger of |u| and |v|
    u, v = scales[0].abs(), scales[1].abs()
    inner = W.abs() <= torch.maximum(u, v)
    first = torch.where(inner & (u < v), -sign, sign)
    second = torch.where(inner & (u >= v), -sign, sign)
    return [first * flips[0], second * flips[1]]


def _sum(mu: Tensor, alphas: list[Tensor], signs: list[Tensor]) -> Tensor:
    total = mu.unsqueeze(-1)
    for alpha, sign in zip(alphas, signs):
        total = torch.addcmul(total, alpha.unsqueeze(-1), sign)
    return total
