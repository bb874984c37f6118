"""PBS2P with its avoidable losses taken out: our own options on top of the paper's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.levels import fit_levels, fit_scale
from subbit.binarize.refine import Coding, refine
from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable
from subbit.errors import RecipeError
from subbit.linalg import BlockView, Factor, factorize, run_blocks, run_rows
from subbit.methods.assemble import CodedBlock, join_rows, storing
from subbit.methods.base import LinearStats
from subbit.methods.pbs2p import PBS2P, PBS2POptions

__all__ = ["PBS2PPlus", "PBS2PPlusOptions"]

_KEEP_ALL = (8, 8)


class PBS2PPlusOptions(PBS2POptions):
    """The options of `pbs2p`, and ours.

    Attributes:
        codebook: "groups": what `pbs2p` fits (three magnitude groups and salient columns) is the
            start; the others have no salient columns: "free": `free_levels` values a row and
            block; "binary": -alpha and alpha; "ternary": -alpha, 0 and alpha, of which the zeros
            come on top of those of N:M.
        sweeps: joint level solves and descent sweeps in every block.
        remask: let kept and pruned weights of M consecutive columns change places during the
            descent; not where whole columns are pruned.
        passes: sweeps over all blocks of the row afterwards, with the whole H, each block against
            its conditional target.
        row_groups: where outputs count by their gradients (`calibration.outputs`): rows are
            compressed in so many groups, and each group's error is absorbed by the next.
        row_percdamp: share of mean(diag G) that is added to the diagonal of G.
    """

    compensation: Literal["diagonal", "exact"] = "exact"
    objective: Literal["gram", "schur"] = "schur"
    codebook: Literal["groups", "free", "binary", "ternary"] = "free"
    free_levels: int = Field(6, ge=1, le=16)
    sweeps: int = Field(6, ge=0)
    remask: bool = True
    passes: int = Field(3, ge=0)
    row_groups: int = Field(8, ge=1)
    row_percdamp: float = Field(0.1, gt=0)


class PBS2PPlus(PBS2P):
    """PBS2P refined: exact compensation, Schur objective, joint solve, descent, mask re-chosen.

    Without N:M nothing is pruned.

    With `codebook=groups`, `sweeps=0`, `passes=0`, `compensation=diagonal`, `objective=gram` it is
    `pbs2p`, bit for bit.
    """

    name = "pbs2p-plus"
    paper = "PBS2P, with options of this project"
    year = 2026
    summary = "6 free levels, exact compensation, joint solve and descent, mask re-chosen"
    nm_use = "optional"
    Opt = PBS2PPlusOptions
    options: PBS2PPlusOptions

    def check_outputs(self) -> None:
        """Rows are compressed in groups, so that nothing may be chosen for all of them at once."""
        o = self.options
        if o.codebook == "groups" or o.pruning == "structured":
            what = "codebook=groups" if o.codebook == "groups" else "pruning=structured"
            raise RecipeError(
                f"calibration.outputs=gradient takes rows in groups, but {what} chooses columns "
                "for all rows at once; write codebook: free, binary or ternary, and semi-structured"
                " pruning"
            )

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        factor = factorize(stats.H, self.settings.percdamp)
        W = factor.live(W)
        if stats.G is None:
            return self._rows(W, stats, nm, factor)
        self.check_outputs()

        def compress_rows(rows: Tensor, group: int) -> CompressedLinear:
            # by its name a linear has its own random scores, and so has a group
            own = replace(stats, name=f"{stats.name}, row group {group}") if group else stats
            return self._rows(rows, own, nm, factor)

        o = self.options
        return join_rows(run_rows(W, stats.G, o.row_groups, o.row_percdamp, compress_rows))

    def _rows(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None, factor: Factor
    ) -> CompressedLinear:
        """Compress some rows of a linear whose dead columns are zero."""
        o, settings = self.options, self.settings
        stored_nm, nm = nm, nm or _KEEP_ALL
        scorer = self._scorer(W, factor, stats)
        as_stored = storing(settings.levels, W)

        fitted: list[CodedBlock] = []  # with float16 parameters, which a pass goes on from

        def compress_block(block: BlockView) -> CodedBlock:
            start = self._start(block, self._score(block, W, scorer), nm)
            fitted.append(self._refined(block.W, block.S, start, nm, o.sweeps))
            return as_stored(fitted[-1])

        blocks = run_blocks(
            W,
            factor,
            settings.blocksize,
            compress_block,
            compensation=o.compensation,
            objective=o.objective,
        )
        if o.passes:
            blocks = self._pass_over_all(W, factor.damped(), fitted, nm, as_stored)
        return self._assembled(blocks, stored_nm, factor)

    def _start(self, block: BlockView, score: Tensor, nm: tuple[int, int]) -> CodedBlock:
        codebook, count = self.options.codebook, self.options.free_levels
        if codebook == "groups":
            return self._compress_block(block, score, nm)
        n, m = nm
        keep, weight = self._ranks(score, nm) >= m - n, block.S.diagonal()
        if codebook == "free":
            codes, params = fit_levels(block.W, keep, count, weight)
            kind = "free"
        else:
            codes, params = fit_scale(block.W, keep, codebook == "ternary", weight)
            kind, count = ("ternary", 1) if codebook == "ternary" else ("symmetric", 1)
        table = LevelTable(kind, count, params.half().unsqueeze(1))
        return CodedBlock(codes.to(torch.uint8), table)

    def _refined(
        self, target: Tensor, S: Tensor, block: CodedBlock, nm: tuple[int, int], sweeps: int
    ) -> CodedBlock:
        if sweeps == 0:
            return block
        remask = self.options.remask and self.options.pruning != "structured"  # columns stay whole
        coding = refine(target, S, coding_of(block), nm, sweeps=sweeps, remask=remask)
        return coded(coding, block)

    def _pass_over_all(
        self,
        W: Tensor,
        H: Tensor,
        fitted: list[CodedBlock],
        nm: tuple[int, int],
        as_stored: Callable[[CodedBlock], CodedBlock],
    ) -> list[CodedBlock]:
        """Sweep over the blocks, the others fixed: target `Q_b + R_b H_bb^-1`, R = (W - Q) H.

        A block is refined from float16 parameters; Q is what will be stored.
        """
        fitted = list(fitted)
        blocks = [as_stored(block) for block in fitted]
        Q = torch.cat([block.dequantize() for block in blocks], 1)
        R = (W - Q) @ H
        size = self.settings.blocksize
        for _ in range(self.options.passes):
            for i, block in enumerate(fitted):
                b = slice(i * size, i * size + block.codes.shape[1])
                target = Q[:, b] + torch.linalg.solve(H[b, b], R[:, b].T).T
                fitted[i] = self._refined(target, H[b, b], block, nm, sweeps=1)
                blocks[i] = as_stored(fitted[i])
                change = blocks[i].dequantize() - Q[:, b]
                R -= change @ H[b]
                Q[:, b] += change
        return blocks


def coding_of(block: CodedBlock) -> Coding:
    """A coded block as the refinement wants it; salient levels only if a column is salient."""
    tables = [block.levels]
    salient = torch.zeros(block.codes.shape[1], dtype=torch.bool, device=block.codes.device)
    if block.salient is not None and block.salient_levels is not None and block.salient.any():
        tables.append(block.salient_levels)
        salient = block.salient
    params = torch.cat([table.params.squeeze(1).float() for table in tables], 1)
    kinds = tuple((table.kind, table.groups) for table in tables)
    return Coding(block.codes.long(), params, kinds, salient)


def coded(coding: Coding, like: CodedBlock) -> CodedBlock:
    """A refined block as it will be stored, salient columns as they were in `like`."""
    params, tables = coding.params, []
    for kind, groups in coding.tables:
        count = groups * LEVEL_KINDS[kind].params_per_group
        tables.append(LevelTable(kind, groups, params[:, :count].half().unsqueeze(1)))
        params = params[:, count:]
    salient_levels = tables[1] if len(tables) > 1 else like.salient_levels
    return CodedBlock(coding.codes.to(torch.uint8), tables[0], like.salient, salient_levels)
