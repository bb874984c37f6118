"""ALPS: one-shot pruning by operator splitting (Meng, Behdin, Wang, Mazumder, 2024)."""

from pydantic import Field
from torch import Tensor

from subbit.codes import SparseLinear
from subbit.linalg import factorize
from subbit.methods.base import LinearStats, Method, damping_record
from subbit.methods.pruned import PruningOptions, sparse_linear
from subbit.prune import select
from subbit.prune.admm import admm, conjugate_gradients

__all__ = ["ALPS", "ALPSOptions"]


class ALPSOptions(PruningOptions):
    """Options of ALPS, with the paper's values as defaults.

    Attributes:
        rho: first penalty, for H scaled to a unit diagonal.
        iterations: of ADMM, at most.
        cg_steps: of the conjugate gradients that re-fit the kept weights.
    """

    rho: float = Field(0.1, gt=0)
    iterations: int = Field(300, ge=1)
    cg_steps: int = Field(10, ge=0)


class ALPS(Method):
    """ADMM between the best weights and the best mask, then the best weights on that mask.

    `min tr((W_hat - W) H (W_hat - W)^T)` with `W_hat = D`, D sparse (equations 3 and 4):
    `B = (W H - V + rho D)(H + rho I)^-1`, `D = P(B + V / rho)`, `V += rho (B - D)`, with P the
    projection on the largest entries (N:M, unstructured, or whole columns) and rho growing with
    how much of the mask still moves (Section 3.2). The weights on the final mask are re-fitted by
    conjugate gradients, all rows at once (Algorithm 2). H is damped and scaled to a unit diagonal.
    """

    name = "alps"
    paper = "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs"
    year = 2024
    summary = "mask and weights by ADMM, weights re-fitted on the mask; slow and good"
    Opt = ALPSOptions
    options: ALPSOptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None) -> SparseLinear:
        o = self.options
        factor = factorize(stats.H, self.settings.percdamp)
        H = factor.damped()
        norm = H.diagonal().sqrt()
        H = H / norm / norm[:, None]
        B = factor.live(W) * norm
        found = admm(
            B,
            H,
            lambda matrix: select(matrix.square(), nm, o.pruning, by_row=False),
            rho=o.rho,
            iterations=o.iterations,
        )
        fitted = conjugate_gradients(H, B @ H, found.mask, found.B * found.mask, o.cg_steps)
        record = damping_record(factor) | {
            "iterations": len(found.residuals),
            "residual": found.residuals[-1],
        }
        return sparse_linear(fitted / norm, found.mask, nm, o.pruning, record)
