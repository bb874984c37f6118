"""What BiLLM, ARB-LLM and STBLLM share: salient columns, groups by size, and the block loop."""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.groups import Groups, Split, group_scores, group_weights
from subbit.binarize.salient import column_limit
from subbit.codes import CompressedLinear
from subbit.errors import RecipeError
from subbit.linalg import BlockView, Factor, factorize, run_blocks
from subbit.methods.assemble import CodedBlock, FittedPart, assemble, code_block, storing
from subbit.methods.base import LinearStats, Method, Options, SplitGrid, damping_record
from subbit.prune import METRICS, PRUNING, Scorer, select, structure

__all__ = ["GroupedMethod", "GroupedOptions", "When"]

When = Literal["before", "inside", "after"]


class GroupedOptions(Options):
    """Options of every grouped binarisation.

    Where there is an N:M, `fine_metric` and `pruning` say which weights go. `split_points` part
    the ordinary weights in groups, one more than there are points; each point is the one before it
    times `sigma`.

    `salient_max` is of 128 columns, in other blocks the same share (with `published` the number).

    With `published` the groups are searched as the published code does, which leaves `split_grid`
    without effect, and pruned weights are filled in again, as they are there.
    """

    published: bool = False
    fine_metric: Literal[METRICS] = "wanda"
    pruning: Literal[PRUNING] = "semi-structured"
    salient_max: int = Field(50, ge=0)
    split_points: int = Field(1, ge=0, le=3)
    sigma: float = Field(2.0, gt=1.0)
    split_grid: SplitGrid = (0.1, 0.9, 9)


class GroupedMethod(Method):
    """A method that binarises salient columns in two planes and the other columns in groups.

    A subclass says how a part is fitted (`_fit`) and whether its levels have a mean, which metric
    chooses its N:M mask and when, and which split points it searches.
    """

    options: GroupedOptions
    nm_use = "optional"
    int8_levels = True
    level_dtype: ClassVar[torch.dtype] = torch.float16
    published_grid: ClassVar[tuple[float, float, int]] = (0.1, 0.9, 81)
    mean: ClassVar[bool] = True
    split_salient: ClassVar[bool] = False
    published_on_inputs: ClassVar[bool] = False  # the published split search's error

    @property
    def metric(self) -> str:
        """What chooses the pruned weights."""
        return self.options.fine_metric

    @property
    def when(self) -> When:
        """Mask the weights before anything else, block by block inside the loop, or after it."""
        return "inside"

    @property
    def split(self) -> Split:
        """The split points of the ordinary weights."""
        o = self.options
        grid = self.published_grid if o.published else o.split_grid
        return Split(o.split_points, grid, o.sigma)

    def check_nm(self, nm: tuple[int, int] | None) -> None:
        super().check_nm(nm)
        if nm is None and self.options.pruning != "semi-structured":
            raise RecipeError(
                f"method '{self.name}' with pruning {self.options.pruning} must know the share to "
                "keep; give it nm, such as nm: '4:8'"
            )

    def _check_int8(self) -> None:
        super()._check_int8()
        if self.options.published:
            raise RecipeError(
                f"method '{self.name}' with published does as the published code, which knows no "
                "int8 levels; write levels: fp16 or leave out published"
            )

    @abstractmethod
    def _fit(self, block: BlockView, columns: Tensor, support: Tensor, planes: int) -> FittedPart:
        """Binarise columns (bool `(b,)`) in groups; `support`: bool `(groups, rows, k)`."""

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        factor = factorize(stats.H, self.settings.percdamp)
        W = factor.live(W)
        record = damping_record(factor)
        size = self.settings.blocksize
        scorer = self._scorer(W, factor, stats)
        pruning = self.options.pruning
        when = None if nm is None else "before" if self.options.published else self.when
        mask = torch.ones_like(W, dtype=torch.bool)
        if when == "before":
            mask = select(scorer.score(W), nm, pruning, by_row=scorer.by_row)
            W = W * mask
            if self.options.published:
                mask, nm = torch.ones_like(mask), None

        as_stored = storing(self.settings.levels, W)

        def compress_block(block: BlockView) -> CodedBlock:
            keep = mask[:, block.start : block.stop]
            if when == "inside":
                keep = select(scorer(block), nm, pruning, by_row=scorer.by_row)
            return as_stored(self._compress_block(block, keep))

        blocks = run_blocks(W, factor, size, compress_block)
        kept, whole = structure(nm, pruning)
        result = assemble(blocks, size, kept, record, structured=whole, dtype=self.level_dtype)
        if when == "after":
            W_hat = result.dequantize()
            scores = self._scorer(W_hat, factor, stats).score(W_hat)
            keep = select(scores, nm, pruning, by_row=scorer.by_row)
            result = replace(result, codes=result.codes * keep)
        return result

    def _compress_block(self, block: BlockView, keep: Tensor) -> CodedBlock:
        counted = keep if self.options.published else keep & block.live
        groups = self._groups(block, counted)

        def fit(columns: Tensor, salient: bool) -> FittedPart:
            support = groups.supports(salient) & counted[:, columns]
            return self._fit(block, columns, support, 2 if salient else 1)

        parts = fit(~groups.salient, False), fit(groups.salient, True)
        # published code compensates for levels in float32 and never stores any
        dtype = torch.float32 if self.options.published else self.level_dtype
        return code_block(groups, keep, *parts, mean=self.mean, dtype=dtype)

    def _groups(self, block: BlockView, keep: Tensor) -> Groups:
        """Find the groups of a block."""
        o = self.options
        score = (block.W / block.U.diagonal()).square()
        if o.published:
            return group_scores(
                score,
                limit=max(o.salient_max - 1, 0),
                split=self.split,
                split_salient=self.split_salient,
                S=block.S if self.published_on_inputs else None,
            )
        return group_weights(
            block.W,
            score,
            keep,
            limit=column_limit(o.salient_max, block.stop - block.start),
            split=self.split,
            split_salient=self.split_salient,
        )

    def _scorer(self, W: Tensor, factor: Factor, stats: LinearStats) -> Scorer:
        seed = self.settings.seed
        return Scorer(self.metric, W, stats.H, factor, seed=seed, name=stats.name)
