"""Stepwise pruning with binarization optimization (PBS2P 3.2, earlier version Algorithm 1).

A binarised part of a block (a magnitude group, or the salient columns with their second plane) is
a combination of planes: `w_hat = sum_i p_i v_i` per row, with `v_0` the support (its p is mu) and
the others sign matrices on the support (their p are alphas).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part", "alternate", "binarize_part", "spbo"]

_NOISE = 1e-6  # of what a plane could weigh at most: below it float32 cannot tell its weight from 0


@dataclass(frozen=True)
class Part:
    """One binarised part of a block, or several stacked in leading dimensions.

    Attributes:
        support: bool `(..., rows, b)`: the weights of the part, before pruning.
        signs: float32 `(..., rows, planes, b)` of +-1, 0 off the support.
        params: float32 `(..., rows, 1 + planes)`: mu, alpha_1, alpha_2...
    """

    support: Tensor
    signs: Tensor
    params: Tensor

    def dense(self) -> Tensor:
        """What the planes add up to, float32 `(..., rows, b)`, 0 off the support."""
        mu, alphas = self.params[..., :1], self.params[..., 1:, None]
        return mu * self.support + (alphas * self.signs).sum(-2)


def binarize_part(W: Tensor, support: Tensor, planes: int, means: int = 1) -> Part:
    """Plain (residual) binarisation of a part (PBS2P Eq. 1): mean, then sign and mean magnitude.

    Args:
        W: float32 `(rows, b)`.
        support: bool `(..., rows, b)`; rows may be empty (their parameters are 0).
        planes: 1, or 2 for residual binarisation.
        means: how many of the passes subtract the mean of what they are given: 0 as BiLLM and
            STBLLM print it, 1 as PBS2P does, all of them in the published code of BiLLM.
    """
    count = support.sum(-1).clamp_min(1)
    residual = W * support
    mu = torch.zeros(residual.shape[:-1], dtype=W.dtype, device=W.device)
    signs, params = [], [mu]
    for i in range(planes):
        if i < means:
            mean = residual.sum(-1) / count
            mu = params[0] = mu + mean
            residual = (residual - mean.unsqueeze(-1)) * support
        sign = torch.where(residual >= 0, 1.0, -1.0) * support
        alpha = residual.abs().sum(-1) / count
        residual = residual - alpha.unsqueeze(-1) * sign
        signs.append(sign)
        params.append(alpha)
    return Part(support, torch.stack(signs, -2), torch.stack(params, -1))


def spbo(
    W: Tensor,
    S: Tensor,
    part: Part,
    ranks: Tensor,
    steps: int,
    *,
    tau: int,
    mask_aware: bool,
    target: str,
) -> Part:
    """Prune a part one element of every M at a time, re-fitting mu and alpha after each step.

    Args:
        W: float32 `(rows, b)`, the unpruned weights.
        S: `(b, b)`, the quadratic form of the error.
        part: binarised on the unpruned weights.
        ranks: uint8 `(rows, b)`: order in which each N:M group loses its weights.
        steps: M - N; 0 = only re-fit.
        tau: alternations of mu and alpha a step.
        mask_aware: True: mu lives on the retained weights, the stationary point of the masked
            loss; False: mu is fitted to the whole row, Eq. 5-6 as printed.
        target: "retained": fit the retained weights alone (the paper); "full": fit the unpruned
            weights of the part, so that mu and alpha absorb some of the pruning error.
    """
    if W.shape[1] == 0:
        return part
    params = part.params
    whole = W * part.support
    if not mask_aware and not _felt(S.sum(), torch.ones_like(W[0]), S):
        # where the inputs of a token add up to 0 the printed objective says nothing of mu: none
        params = torch.cat((torch.zeros_like(params[..., :1]), params[..., 1:]), -1)
    for step in range(1, steps + 1) if steps else (0,):
        kept = (part.support & (ranks >= step)).to(W.dtype).unsqueeze(-2)
        carrier = kept if mask_aware else torch.ones_like(kept)
        planes = torch.cat((carrier, part.signs * kept), -2)  # (..., rows, 1 + planes, b)
        wanted = W * kept.squeeze(-2) if target == "retained" else whole
        params = alternate(planes, wanted, S, params, tau)
    return Part(part.support, part.signs, params)


def alternate(planes: Tensor, target: Tensor, S: Tensor, params: Tensor, tau: int) -> Tensor:
    """Coordinate descent on `||target - sum_i p_i v_i||_S^2`: mu, then each alpha, tau times.

    All inner products are taken once; the alternation itself is on scalars. A plane with nothing
    left in a row gets the parameter 0; one that the inputs cancel (the mean of all columns, behind
    a LayerNorm) keeps its parameter, on which the error does not depend.

    Args:
        planes: `(..., rows, P, b)`.
        target: `(..., rows, b)`.
        S: `(b, b)`.
        params: `(..., rows, P)`, the start.

    Returns:
        `(..., rows, P)`.
    """
    VS = planes @ S
    G = VS @ planes.mT  # (..., rows, P, P)
    c = (VS @ target.unsqueeze(-1)).squeeze(-1)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    felt = _felt(diagonal, planes, S)
    params = params * planes.any(-1)
    # p_i <- (c_i - sum_{j != i} G_ij p_j) / G_ii; one that is not felt has a zero row
    inverse = torch.where(felt, diagonal, 1.0).reciprocal() * felt
    pull = -(G - torch.diag_embed(diagonal)) * inverse.unsqueeze(-1)
    rest = torch.where(felt, c * inverse, params)
    p = list(params.unbind(-1))
    for _ in range(tau):
        for i in range(len(p)):
            p[i] = rest[..., i]
            for j in range(len(p)):
                if j != i:
                    p[i] = torch.addcmul(p[i], pull[..., i, j], p[j])
    return torch.stack(p, -1)


def _felt(weight: Tensor, planes: Tensor, S: Tensor) -> Tensor:
    """Whether a plane's `v S v^T`, `weight` `(...)`, is more than rounding errors.

    It is at most `(|v| sqrt(diag S))^2`, and its errors are a share of that.
    """
    most = (planes.abs() @ S.diagonal().clamp_min(0).sqrt()).square()
    return weight > _NOISE * most
