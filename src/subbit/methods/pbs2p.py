"""PBS2P: progressive binarization with semi-structured pruning (Yan et al., 2025)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.groups import Split, group_weights
from subbit.binarize.salient import column_limit
from subbit.binarize.spbo import Part, binarize_part, spbo
from subbit.codes import CompressedLinear
from subbit.linalg import BlockView, Factor, factorize, run_blocks
from subbit.methods.assemble import CodedBlock, assemble, code_block, storing
from subbit.methods.base import LinearStats, Method, Options, SplitGrid, damping_record
from subbit.prune import BY_ROW, PRUNING, Scorer, pruning_ranks, structure

__all__ = ["PBS2P", "PBS2POptions"]


class PBS2POptions(Options):
    """Every constant of the paper, with the paper's value as default.

    Where the paper is silent or contradicts itself, docs/differences.md says what was chosen.
    """

    fine_metric: Literal["hessian", "wanda", "magnitude", "si", "random"] = "hessian"
    pruning: Literal[PRUNING] = "semi-structured"
    hessian_score: Literal["cholesky", "printed", "obs"] = "cholesky"
    score_from: Literal["compensated", "original"] = "compensated"
    spbo: bool = True
    tau: int = Field(10, ge=0)
    mask_aware: bool = True
    target: Literal["retained", "full"] = "retained"
    salient: bool = True
    salient_max: int = Field(50, ge=0)
    split_points: int = Field(2, ge=0, le=3)
    split_grid: SplitGrid = (0.1, 0.9, 160)
    sigma: float = Field(2.0, gt=1.0)
    groups_from: Literal["retained", "full"] = "retained"
    compensation: Literal["diagonal", "exact"] = "diagonal"
    objective: Literal["gram", "schur"] = "gram"


class PBS2P(Method):
    """Prune N:M by the Hessian score, binarise in groups, and re-fit while pruning (Section 3).

    Per block of columns: scores and pruning order (3.3), salient columns with two sign planes and
    three magnitude groups for the rest (3.4), SPBO (3.2), then the block-wise compensation of OBC.
    """

    name = "pbs2p"
    paper = "Progressive Binarization with Semi-Structured Pruning for LLMs"
    year = 2025
    summary = "N:M by Hessian score, 3 groups + salient columns, parameters re-fitted while pruning"
    Opt = PBS2POptions
    int8_levels = True
    options: PBS2POptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int]) -> CompressedLinear:
        o = self.options
        factor = factorize(stats.H, self.settings.percdamp)
        W = factor.live(W)
        scorer = self._scorer(W, factor, stats)
        as_stored = storing(self.settings.levels, W)

        def compress_block(block: BlockView) -> CodedBlock:
            return as_stored(self._compress_block(block, self._score(block, W, scorer), nm))

        blocks = run_blocks(
            W,
            factor,
            self.settings.blocksize,
            compress_block,
            compensation=o.compensation,
            objective=o.objective,
        )
        return self._assembled(blocks, nm, factor)

    def _assembled(
        self, blocks: list[CodedBlock], nm: tuple[int, int], factor: Factor
    ) -> CompressedLinear:
        nm, whole = structure(nm, self.options.pruning)
        size = self.settings.blocksize
        return assemble(blocks, size, nm, damping_record(factor), structured=whole)

    def _scorer(self, W: Tensor, factor: Factor, stats: LinearStats) -> Scorer:
        """The fine stage's metric on this linear."""
        o = self.options
        return Scorer(
            o.fine_metric,
            W,
            stats.H,
            factor,
            hessian_score=o.hessian_score,
            seed=self.settings.seed,
            name=stats.name,
        )

    def _score(self, block: BlockView, W: Tensor, scorer: Scorer) -> Tensor:
        """Scores of a block's weights, as compensated so far or as they are in `W`."""
        if self.options.score_from == "original":
            return scorer.score(W[:, block.start : block.stop], block.start)
        return scorer(block)

    def _ranks(self, score: Tensor, nm: tuple[int, int]) -> Tensor:
        """In which of the M - 1 steps each weight of a block goes."""
        o = self.options
        return pruning_ranks(score, nm, o.pruning, by_row=o.fine_metric in BY_ROW)

    def _compress_block(self, block: BlockView, score: Tensor, nm: tuple[int, int]) -> CodedBlock:
        o, (n, m) = self.options, nm
        ranks = self._ranks(score, nm)
        keep = ranks >= m - n
        counted = block.live & (keep if o.groups_from == "retained" else torch.ones_like(keep))
        most = o.salient_max if o.salient else 0
        # salient by the Hessian whatever metric prunes (STBLLM, Algorithm 2; PBS2P 3.4)
        salience = block.W.square() / block.U.diagonal().square()
        groups = group_weights(
            block.W,
            salience,
            counted,
            limit=column_limit(most, block.stop - block.start),
            split=Split(o.split_points, o.split_grid, o.sigma),
            split_salient=False,
        )

        def fit(columns: Tensor, salient: bool) -> Part:
            support = groups.supports(salient) & block.live[columns]
            return self._fit(block, columns, support, ranks, m - n, planes=2 if salient else 1)

        parts = fit(~groups.salient, False), fit(groups.salient, True)
        return code_block(groups, keep, *parts)

    def _fit(
        self,
        block: BlockView,
        columns: Tensor,
        support: Tensor,
        ranks: Tensor,
        steps: int,
        planes: int,
    ) -> Part:
        """Binarise some columns of a block in one or more (stacked) groups of weights."""
        o = self.options
        W, ranks = block.W[:, columns], ranks[:, columns]
        if not o.spbo:  # prune in one shot, then binarise what is left (Table 4a)
            return binarize_part(W, support & (ranks >= steps), planes)
        return spbo(
            W,
            block.S[columns][:, columns],
            binarize_part(W, support, planes),
            ranks,
            steps,
            tau=o.tau,
            mask_aware=o.mask_aware,
            target=o.target,
        )
