"""PBS2P: progressive binarization with semi-structured pruning (Yan et al., 2025)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.salient import search_salient
from subbit.binarize.spbo import Part, binarize_part, spbo
from subbit.binarize.split import label_groups, search_splits
from subbit.codes import CompressedLinear, LevelTable
from subbit.linalg import BlockView, factorize
from subbit.methods.assemble import CodedBlock, compress_blocks
from subbit.methods.base import LinearStats, Method, Options, damping_record
from subbit.prune import Scorer, ranks_in_groups

__all__ = ["PBS2P", "PBS2POptions"]


class PBS2POptions(Options):
    """Every constant of the paper, with the paper's value as default.

    Where the paper is silent or contradicts itself, docs/differences.md says what was chosen.
    """

    fine_metric: Literal["hessian", "wanda", "magnitude", "si", "random"] = "hessian"
    hessian_score: Literal["cholesky", "printed", "obs"] = "cholesky"
    spbo: bool = True
    tau: int = Field(10, ge=0)
    mask_aware: bool = True
    target: Literal["retained", "full"] = "retained"
    salient: bool = True
    salient_max: int = Field(50, ge=0)
    split_points: int = Field(2, ge=0, le=3)
    split_grid: tuple[float, float, int] = (0.1, 0.9, 160)
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
    options: PBS2POptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int]) -> CompressedLinear:
        o = self.options
        factor = factorize(stats.H, self.settings.percdamp)
        scorer = Scorer(
            o.fine_metric,
            W,
            stats.H,
            factor,
            hessian_score=o.hessian_score,
            seed=self.settings.seed,
            name=stats.name,
        )
        return compress_blocks(
            W,
            factor,
            self.settings,
            nm,
            lambda block: self._compress_block(block, scorer(block), nm),
            record=damping_record(factor),
            compensation=o.compensation,
            objective=o.objective,
        )

    def _compress_block(self, block: BlockView, score: Tensor, nm: tuple[int, int]) -> CodedBlock:
        o, (n, m) = self.options, nm
        ranks = ranks_in_groups(score, m)
        keep = ranks >= m - n
        counted = keep if o.groups_from == "retained" else torch.ones_like(keep)
        width = block.stop - block.start  # the last block may be shorter: same share of columns
        limit = o.salient_max * width // self.settings.blocksize if o.salient else 0
        salient = search_salient(block.W, score, counted, limit)
        rest = ~salient
        W = block.W[:, rest]
        splits = search_splits(
            W, counted[:, rest], points=o.split_points, grid=o.split_grid, sigma=o.sigma
        )
        labels = label_groups(W, splits)
        group = torch.arange(o.split_points + 1, dtype=labels.dtype, device=labels.device)
        groups = self._fit(block, rest, labels == group[:, None, None], ranks, m - n, planes=1)
        pair = self._fit(
            block,
            salient,
            torch.ones(1, 1, dtype=torch.bool, device=W.device),
            ranks,
            m - n,
            planes=2,
        )
        return code_block(keep, salient, labels, groups, pair)

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
        support = support.expand(*support.shape[:-2], *W.shape)
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


def code_block(
    keep: Tensor, salient: Tensor, labels: Tensor, groups: Part, pair: Part
) -> CodedBlock:
    """Turn fitted parts into codes and stored parameters.

    Args:
        keep: bool `(rows, b)`: what pruning leaves.
        salient: bool `(b,)`, k of them set.
        labels: uint8 `(rows, b - k)`: magnitude group of the ordinary weights.
        groups: the G groups of the ordinary columns, stacked, one plane each.
        pair: the salient columns, two planes.
    """
    codes = torch.zeros_like(keep, dtype=torch.uint8)
    sign = (groups.signs.squeeze(-2).sum(0) > 0).to(torch.uint8)
    codes[:, ~salient] = 1 + sign + 2 * labels
    first, second = (pair.signs > 0).to(torch.uint8).unbind(-2)
    codes[:, salient] = 1 + first + 2 * second
    mus, alphas = groups.params.permute(2, 1, 0)  # each (rows, G)
    mu, alpha1, alpha2 = pair.params.unbind(-1)
    return CodedBlock(
        codes=codes * keep,
        levels=LevelTable("pairs", mus.shape[1], _stored(torch.cat((alphas, mus), -1))),
        salient=salient,
        salient_levels=LevelTable("residual", 1, _stored(torch.stack((alpha1, alpha2, mu), -1))),
    )


def _stored(params: Tensor) -> Tensor:
    """Parameters of one block `(rows, P)` as they are stored: float16 `(rows, 1, P)`."""
    return params.half().unsqueeze(1)
