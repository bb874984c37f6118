"""STBLLM: structured binarisation below one bit (Dong et al., 2025)."""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from subbit.binarize.groups import Split
from subbit.binarize.spbo import Part, binarize_part
from subbit.linalg import BlockView
from subbit.methods.base import SplitGrid
from subbit.methods.grouped import GroupedMethod, GroupedOptions, When
from subbit.prune import METRICS

__all__ = ["STBLLM", "STBLLMOptions"]


class STBLLMOptions(GroupedOptions):
    """Options of STBLLM.

    `order` is the ablation of App. E.4: with quantise-then-prune the whole weight is binarised and
    its N:M mask chosen on the result. `search` is that of App. E.5: trisection ties the split
    points together (`p2 = sigma p1`), the naive search tries all pairs.
    """

    fine_metric: Literal[METRICS] = "si"
    order: Literal["prune-then-quantise", "quantise-then-prune"] = "prune-then-quantise"
    search: Literal["trisection", "naive"] = "trisection"
    split_points: int = Field(2, ge=0, le=3)
    split_grid: SplitGrid = (0.1, 0.9, 160)


class STBLLM(GroupedMethod):
    """N:M by standardised importance, salient columns in two planes, the rest in three groups.

    Algorithms 1 and 2. The published code prunes by another metric, and its quantiser fills the
    pruned weights in again: with `published` the result is not N:M (docs/differences.md).
    """

    name = "stbllm"
    paper = "STBLLM: Breaking the 1-Bit Barrier with Structured Binary LLMs"
    year = 2025
    summary = "N:M by standardised importance, salient columns in two planes, three groups"
    Opt = STBLLMOptions
    options: STBLLMOptions
    published_grid = (0.1, 0.9, 160)

    @property
    def metric(self) -> str:
        return "ria" if self.options.published else self.options.fine_metric

    @property
    def when(self) -> When:
        return "inside" if self.options.order == "prune-then-quantise" else "after"

    @property
    def mean(self) -> bool:
        return self.options.published

    @property
    def split(self) -> Split:
        tied = super().split
        return tied if self.options.search == "trisection" else replace(tied, sigma=float("inf"))

    def _fit(self, block: BlockView, columns: Tensor, support: Tensor, planes: int) -> Part:
        means = planes if self.mean else 0
        return binarize_part(block.W[:, columns], support, planes, means=means)
