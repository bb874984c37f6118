"""Operator splitting between the best weights and the best mask, and the best weights on a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Splitting", "admm", "conjugate_gradients"]

_EVERY = 3  # iterations between two looks at the mask
_PATIENCE = 30  # iterations after which a mask that hardly moves is taken
_RHO = (1e-6, 1e6)


@dataclass(frozen=True)
class Splitting:
    """What ADMM ends with.

    Attributes:
        B: the weights, float32 `(rows, cols)`, not sparse.
        mask: where the sparse copy of them is not zero, bool `(rows, cols)`.
        residuals: ||B - D|| / ||B|| after every iteration, D the sparse copy.
    """

    B: Tensor
    mask: Tensor
    residuals: list[float]


def admm(
    W: Tensor,
    H: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    rho: float = 0.1,
    iterations: int = 300,
) -> Splitting:
    """Minimise `tr((D - W) H (D - W)^T)` over sparse D (ALPS, Section 3).

    The penalty rho grows with the share of the mask that moved in three iterations: x 1.3 above
    10 %, x 1.2 above 0.5 %, else x 1.1, until the mask stands still. While the first mask does not
    move by more than 0.5 % at all, rho is divided by 5 and the iteration starts again.

    Args:
        W: float32 `(rows, cols)`.
        H: float32 `(cols, cols)`, positive definite, of unit diagonal.
        project: weights -> mask of those that D may keep, bool `(rows, cols)`.
    """
    target = W @ H
    first = project(W)
    kept = int(first.sum())
    mask, D, V = first, W * first, torch.zeros_like(W)
    inverse, seen, moving = _inverse(H, rho), first, False
    residuals: list[float] = []
    for i in range(1, iterations + 1):
        B = (target - V + rho * D) @ inverse
        D = B + V / rho
        mask = project(D)
        D = D * mask
        gap = B - D
        V = V + rho * gap
        residuals.append(_norm(gap) / max(_norm(B), torch.finfo(W.dtype).tiny))
        if i % _EVERY:
            continue
        change = int((mask ^ seen).sum()) / kept
        seen = mask
        if change == 0 and (moving or rho <= _RHO[0]):
            break
        if i > _PATIENCE and change < 3e-4:
            break
        moving = moving or change > 0.005
        if moving:
            rho = min(rho * (1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1), _RHO[1])
        else:
            rho = max(rho / 5, _RHO[0])
            mask = seen = first
            D, V = W * first, torch.zeros_like(W)
        inverse = _inverse(H, rho)
    return Splitting(B, mask, residuals)


def conjugate_gradients(H: Tensor, target: Tensor, mask: Tensor, B: Tensor, steps: int) -> Tensor:
    """Minimise `tr(B H B^T) - 2 tr(B target^T)` over B that is 0 outside the mask.

    Every row is a system of its own; all take the same number of steps (ALPS, Algorithm 2).

    Args:
        H: float32 `(cols, cols)`, positive definite, of unit diagonal.
        target: float32 `(rows, cols)`.
        mask: bool `(rows, cols)`.
        B: where to start, 0 outside the mask; not modified.
        steps: how many.
    """
    tiny = torch.finfo(B.dtype).tiny
    residual = (target - B @ H) * mask
    direction = residual
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ H) * mask
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        B = B + step * direction
        residual = residual - step * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp_min(tiny) * direction
    return B


def _inverse(H: Tensor, rho: float) -> Tensor:
    """`(H + rho I)^-1`, by Cholesky in float64: rounded, it does not depend on the threads."""
    ridged = H.double()
    ridged.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged)).to(H.dtype)


def _norm(A: Tensor) -> float:
    return float(A.square().sum(1, dtype=torch.float64).sum().sqrt())
