"""What the methods that only prune have in common: their options and their 16-bit result."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subbit.codes import SparseLinear
from subbit.methods.base import LinearStats, Method, Options
from subbit.prune import PRUNING, Scorer, select, structure

__all__ = ["PruningOptions", "ScorePruning", "sparse_linear"]


class PruningOptions(Options):
    """Options of the methods that only prune.

    Attributes:
        pruning: N of every M weights, any weights, or whole columns; the same share N / M.
    """

    pruning: Literal[PRUNING] = "semi-structured"


class ScorePruning(Method):
    """Base: keep the weights of the highest scores, as they are.

    Attributes:
        metric: the score, one of `prune.METRICS`.
    """

    metric: ClassVar[str]
    Opt = PruningOptions
    options: PruningOptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None) -> SparseLinear:
        scorer = Scorer(self.metric, W, stats.H, seed=self.settings.seed, name=stats.name)
        mask = select(scorer.score(W), nm, self.options.pruning, by_row=scorer.by_row)
        return sparse_linear(W, mask, nm, self.options.pruning, {})


def sparse_linear(
    W: Tensor, mask: Tensor, nm: tuple[int, int], pruning: str, record: dict[str, Any]
) -> SparseLinear:
    """Keep the weights under a mask, in the 16-bit type that is closer to them.

    float16 on a draw; bfloat16 weights of a model stay what they are, and so do float16 ones.

    Args:
        W: float32 `(rows, cols)`.
        mask: bool `(rows, cols)`, True = kept.
    """
    kept = W * mask
    choices = [kept.to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    errors = [
        float((kept - choice.float()).square().sum(dtype=torch.float64)) for choice in choices
    ]
    values = choices[0] if errors[0] <= errors[1] else choices[1]
    return SparseLinear(values, mask.contiguous(), *structure(nm, pruning), record)
