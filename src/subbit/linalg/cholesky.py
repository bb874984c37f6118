"""Damping ladder and the upper Cholesky factor of the inverse Hessian."""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

__all__ = ["Factor", "factorize"]

_LEAF = 256  # size below which a triangular inverse is left to LAPACK
_LEAST = 1e-7  # less on the diagonal of H is rounded away in float32
_DEAD = 1e-4  # diagonal of a dead column, as a share of the mean of the others
_RUNGS = 5  # percdamp, 10x, 100x, 1000x, 10000x; then the diagonal alone


@dataclass(frozen=True)
class Factor:
    """What the block loop needs of H.

    Attributes:
        H: float32 `(cols, cols)`, undamped, dead columns given a small diagonal.
        U: float32 `(cols, cols)` upper triangular with `(H + damping * I)^-1 = U^T U`.
        dead: bool `(cols,)`: columns whose input is always zero; their weights mean nothing.
        damping: what was added to the diagonal, as a fraction of its mean; inf = only the
            diagonal of H could be used.
    """

    H: Tensor
    U: Tensor
    dead: Tensor
    damping: float

    def live(self, W: Tensor) -> Tensor:
        """A copy of `W` `(rows, cols)` with zeros in the dead columns.

        No weight there may decide what the others get: a grid, a scale, or a place in the mask.
        """
        return W.masked_fill(self.dead, 0.0)

    def damped(self) -> Tensor:
        """H with its damping, `(U^T U)^-1`: what the compensated loss is measured in."""
        if isfinite(self.damping):
            ridge = self.damping * float(self.H.diagonal().mean())
            return self.H + ridge * torch.eye(len(self.H), device=self.H.device)
        return torch.diag(self.H.diagonal())


def factorize(H: Tensor, percdamp: float) -> Factor:
    """Damp and factorise H, climbing a ladder (x10) until the factorisation is sound.

    With J the reversal of all columns, `J H J = C C^T` gives `H = R R^T` for the upper triangular
    `R = J C J`, so `U = R^-1` needs one Cholesky and one triangular inverse. The Cholesky is done
    in float64: LAPACK's depends on the number of threads in its last bits, and rounding the
    result to float32 takes that away.

    Args:
        H: `(cols, cols)` symmetric, un-normalised.
        percdamp: first rung, as a fraction of the mean of the diagonal; 1e-7 at least.
    """
    H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    H[dead, :] = 0
    H[:, dead] = 0
    diagonal[dead] = _DEAD * diagonal[~dead].mean() if not dead.all() else 1.0
    mean = float(diagonal.mean())
    for rung in range(_RUNGS):
        damping = max(percdamp, _LEAST) * 10.0**rung
        U = _inverse_factor(H, damping * mean)
        if U is not None:
            return Factor(H, U, dead, damping)
    return Factor(H, torch.diag(diagonal.rsqrt()), dead, float("inf"))


def _inverse_factor(H: Tensor, ridge: float) -> Tensor | None:
    flipped = H.flip(0, 1).double()
    flipped.diagonal().add_(ridge)
    C, info = torch.linalg.cholesky_ex(flipped)
    if int(info) != 0:
        return None
    U = _lower_inverse(C.to(H.dtype)).flip(0, 1).contiguous()
    return U if bool(torch.isfinite(U).all()) else None


def _lower_inverse(C: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: a third of the work of a full solve."""
    size = C.shape[0]
    if size <= _LEAF:
        eye = torch.eye(size, dtype=C.dtype, device=C.device)
        return torch.linalg.solve_triangular(C, eye, upper=False)
    half = size // 2
    inverse = torch.zeros_like(C)
    top, bottom = _lower_inverse(C[:half, :half]), _lower_inverse(C[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = top, bottom
    inverse[half:, :half] = -(bottom @ (C[half:, :half] @ top))
    return inverse
