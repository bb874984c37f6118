"""DSnoT: dynamic sparse no training, the mask chosen anew (Zhang et al., 2023)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.codes import SparseLinear
from subbit.errors import ModelError
from subbit.linalg import factorize
from subbit.methods.base import LinearStats, Method, Options, damping_record
from subbit.methods.pruned import sparse_linear
from subbit.prune import Scorer, select

__all__ = ["DSnoT", "DSnoTOptions", "reselect"]

_WINDOW = 2048  # tokens over which the published threshold sums the error


class DSnoTOptions(Options):
    """Options of DSnoT, with the values of the published code as defaults.

    Attributes:
        start: the metric of the mask that it starts from.
        pruning: N of every M weights, or any weights.
        cycles: swaps of one row, at most.
        threshold: a row whose error, summed over 2048 tokens, is not above this is left alone.
    """

    start: Literal["wanda", "sparsegpt"] = "wanda"
    pruning: Literal["semi-structured", "unstructured"] = "semi-structured"
    cycles: int = Field(50, ge=0)
    threshold: float = Field(0.1, ge=0)


class DSnoT(Method):
    """Swap kept and pruned weights of a row while its expected output error shrinks.

    A row's expected error is `e = sum over pruned j of w_j E[x_j]`. Each cycle grows back the
    pruned weight of the largest `sign(e) w_j E[x_j] / Var[x_j]` (equation 4) and prunes in its
    place the kept weight of the least starting score, in the same group of M, or, unstructured,
    among those whose `w_j E[x_j]` has the other sign (equation 5). A row stops before a swap that
    would turn the sign of e; one that would not lower |e| is passed over, where the published code
    makes it. The starting mask is by the metric of Wanda or SparseGPT; kept weights are not
    changed, in the published code neither.
    """

    name = "dsnot"
    paper = "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs"
    year = 2023
    summary = "re-chooses a Wanda or SparseGPT mask until outputs are right on average"
    Opt = DSnoTOptions
    options: DSnoTOptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None) -> SparseLinear:
        o, record = self.options, {}
        if stats.mean is None:
            raise ModelError(f"{stats.name}: dsnot needs the mean of its inputs; give it one")
        factor = None
        if o.start == "sparsegpt":
            factor = factorize(stats.H, self.settings.percdamp)
            W = factor.live(W)  # Wanda's score is 0 there, this one is not
            record = damping_record(factor)
        metric = "wanda" if factor is None else "hessian"
        score = Scorer(metric, W, stats.H, factor, name=stats.name).score(W)
        mask = select(score, nm, o.pruning)
        variance = stats.H.diagonal() / (stats.weight or stats.tokens) - stats.mean.square()
        swaps = reselect(
            W * stats.mean,
            score,
            variance.clamp_min(torch.finfo(W.dtype).tiny),
            mask,
            nm[1] if o.pruning == "semi-structured" else None,
            cycles=o.cycles,
            threshold=o.threshold / _WINDOW,
        )
        return sparse_linear(W, swaps.mask, nm, o.pruning, record | {"swaps": swaps.count})


@dataclass(frozen=True)
class Swaps:
    """The mask after the last swap, bool `(rows, cols)`, and how many swaps there were."""

    mask: Tensor
    count: int


def reselect(
    effect: Tensor,
    score: Tensor,
    variance: Tensor,
    mask: Tensor,
    m: int | None,
    *,
    cycles: int,
    threshold: float,
) -> Swaps:
    """Swap weights in every row; see `DSnoT`. |error| never rises, no weight moves twice.

    Args:
        effect: `w_j E[x_j]`, float32 `(rows, cols)`.
        score: importance of the weights, `(rows, cols)`.
        variance: of the inputs, positive, `(cols,)`.
        mask: bool `(rows, cols)`, True = kept; not modified.
        m: swap within groups of m columns; None = anywhere in the row.
    """
    cols = effect.shape[1]
    mask, frozen = mask.clone(), torch.zeros_like(mask)
    group = torch.arange(cols, device=mask.device) // (m or cols)
    error = (effect * ~mask).sum(1)
    sign, active = error.sign(), torch.ones_like(error, dtype=torch.bool)
    count = 0
    for _ in range(cycles):
        active &= error.abs() > threshold
        if not active.any():
            break
        gain = sign[:, None] * effect / variance
        grow = gain.masked_fill(mask | frozen, -torch.inf).argmax(1, keepdim=True)
        fits = mask & ~frozen
        fits &= group == group[grow] if m else effect.sign() == -sign[:, None]
        prune = score.masked_fill(~fits, torch.inf).argmin(1, keepdim=True)
        after = error + (effect.gather(1, prune) - effect.gather(1, grow)).squeeze(1)
        active &= ((~mask & ~frozen).gather(1, grow)).squeeze(1)  # one that can grow is left
        possible = active & fits.gather(1, prune).squeeze(1)
        active &= ~possible | (after.sign() == sign)
        swapped = possible & active & (after.abs() < error.abs())
        swap = swapped[:, None]
        mask.scatter_(1, grow, mask.gather(1, grow) | swap)
        mask.scatter_(1, prune, mask.gather(1, prune) & ~swap)
        frozen.scatter_(1, grow, True).scatter_(1, prune, frozen.gather(1, prune) | swap)
        error = torch.where(swapped, after, error)
        count += int(swapped.sum())
    return Swaps(mask, count)
