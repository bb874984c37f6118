"""PB-LLM: partially binarized large language models (Shang et al., 2024)."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable
from subbit.linalg import BlockView, factorize, run_blocks, sweep_columns
from subbit.methods.base import LinearStats, Method, Options, damping_record
from subbit.methods.grids import fit_grid, grid_values, round_to_grid
from subbit.prune import Scorer

__all__ = ["PBLLM", "PBLLMOptions"]

_LEVELS = 255  # of the salient weights' grid: 8 bits, one code short


class PBLLMOptions(Options):
    """Options of PB-LLM.

    `fine_metric` chooses the salient weights, the `salient_share` of the whole matrix with the
    highest scores.
    """

    fine_metric: Literal["hessian", "magnitude"] = "hessian"
    salient_share: float = Field(0.1, ge=0, lt=1)


class PBLLM(Method):
    """A few weights in 8 bits wherever they stand, the others `+-mean|w|` of their row and block.

    As in its PTQ form: column by column, with GPTQ's compensation. The 8-bit grid is fitted to a
    row's salient weights, the binary scale to the other weights of a row and block when its turn
    comes.
    """

    name = "pb-llm"
    paper = "PB-LLM: Partially Binarized Large Language Models"
    year = 2024
    summary = "the most salient weights in 8 bits, the others binary; errors absorbed as in GPTQ"
    nm_use = "none"
    Opt = PBLLMOptions
    options: PBLLMOptions

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        o, size = self.options, self.settings.blocksize
        factor = factorize(stats.H, self.settings.percdamp)
        W = factor.live(W)
        scores = Scorer(o.fine_metric, W, stats.H, factor).score(W)
        salient = _highest(scores, round(o.salient_share * W.numel()))
        grid = fit_grid(W * salient, _LEVELS)
        blocks = run_blocks(
            W,
            factor,
            size,
            lambda block: _code_block(block, salient[:, block.start : block.stop], grid),
            compensation="exact",
        )
        some = bool(salient.any())
        return CompressedLinear(
            torch.cat([block.codes for block in blocks], 1),
            LevelTable("symmetric", 1, torch.stack([block.alpha for block in blocks], 1)),
            size,
            salient=salient if some else None,
            salient_levels=LevelTable("grid", _LEVELS, grid.unsqueeze(1)) if some else None,
            salient_group_size=W.shape[1] if some else None,
            record=damping_record(factor),
        )


@dataclass(frozen=True)
class _Block:
    """A block's codes `(rows, b)`, binary scale float16 `(rows, 1)`, and weights `(rows, b)`."""

    codes: Tensor
    alpha: Tensor
    W: Tensor

    def dequantize(self) -> Tensor:
        return self.W


def _code_block(block: BlockView, salient: Tensor, grid: Tensor) -> _Block:
    counted = ~salient & block.live
    mean = (block.W.abs() * counted).sum(1) / counted.sum(1).clamp_min(1)
    alpha = mean.half()
    codes = torch.empty_like(salient, dtype=torch.uint8)

    def replace(W: Tensor, j: int) -> Tensor:
        index = round_to_grid(W[j], grid, _LEVELS)
        positive = W[j] >= 0
        value = torch.where(positive, alpha.float(), -alpha.float())
        codes[:, j] = 1 + torch.where(salient[:, j], index, positive.float()).to(torch.uint8)
        return torch.where(salient[:, j], grid_values(index, grid), value)

    return _Block(codes, alpha.unsqueeze(1), sweep_columns(block, replace))


def _highest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores of the whole matrix, bool; of equal ones the first go first."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
