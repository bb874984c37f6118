"""The weight to compress towards when a linear's inputs are no longer the original model's."""

import torch
from torch import Tensor

from subbit.linalg.gram import PairAccumulator

__all__ = ["shifted_target"]


def shifted_target(W: Tensor, pair: PairAccumulator, strength: float, percdamp: float) -> Tensor:
    """Move `W` towards the least-squares solution for the original model's outputs.

    With X the compressed model's inputs and Y what the original model puts out (plus the gap that
    the linear should make up for), `argmin |X W*^T - Y|^2 = (W C + D) H^-1`. The shift is damped by
    `percdamp` of mean(diag H) and scaled: `W + strength (W (C - H) + D) (H + damp)^-1`. The
    asymmetric calibration of GPTAQ with the whole least-squares solution as target; see
    docs/methods.md.

    Args:
        W: float32 `(rows, cols)`.
        pair: H, C and D of its inputs.
        strength: 0 = W, 1 = all the way.
        percdamp: share of mean(diag H).

    Returns:
        Float32 `(rows, cols)`; W itself where the inputs are all 0 or the system cannot be solved.
    """
    pull, H = pair.pull(W), pair.H
    damp = max(percdamp, 1e-6) * H.diagonal().mean()
    damped = H.double() + damp.double() * torch.eye(len(H), dtype=torch.float64, device=H.device)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not float(damp) > 0:
        return W
    shift = torch.cholesky_solve(pull.T.double(), lower).T
    target = W + strength * shift.float()
    return target if bool(torch.isfinite(target).all()) else W
