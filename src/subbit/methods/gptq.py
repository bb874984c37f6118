"""GPTQ: accurate post-training quantization (Frantar, Ashkboos, Hoefler, Alistarh, 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.codes import CompressedLinear
from subbit.linalg import BlockView, factorize, run_blocks, sweep_columns
from subbit.methods.base import LinearStats, Method, damping_record
from subbit.methods.grids import (
    GridOptions,
    fit_grid,
    grid_linear,
    grid_values,
    round_to_grid,
)

__all__ = ["GPTQ"]


class GPTQ(Method):
    """Round column by column; the columns to the right absorb each column's error.

    Equations 2 and 3 of the paper with H^-1 in Cholesky form (its Algorithm 1): column j becomes
    `q_j`, and every later column k loses `(w_j - q_j) U_jk / U_jj`; lazily, first within a block of
    columns, then once for all columns right of it. A group's grid is fitted to its weights as
    compensated when its turn comes; with one group a row, to the original weights. Columns in their
    given order (no "act-order").
    """

    name = "gptq"
    paper = "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
    year = 2022
    summary = "asymmetric 1 to 4 bit grid, column by column, errors absorbed by later columns"
    nm_use = "none"
    Opt = GridOptions
    options: GridOptions

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        bits, blocksize = self.options.bits, self.settings.blocksize
        factor = factorize(stats.H, self.settings.percdamp)
        whole = None if self.options.group == "block" else fit_grid(factor.live(W), 2**bits)
        blocks = run_blocks(
            W,
            factor,
            blocksize,
            lambda block: _round_block(block, bits, whole),
            compensation="exact",
        )
        params = [block.params for block in blocks] if whole is None else [whole]
        size = blocksize if whole is None else W.shape[1]
        index = torch.cat([block.index for block in blocks], 1)
        return grid_linear(index, params, size, bits, damping_record(factor))


@dataclass(frozen=True)
class _Rounded:
    """A block's level indices `(rows, b)` of one grid, float16 `(rows, 2)`, and its weights."""

    index: Tensor
    params: Tensor
    W: Tensor

    def dequantize(self) -> Tensor:
        return self.W


def _round_block(block: BlockView, bits: int, whole: Tensor | None) -> _Rounded:
    params = fit_grid(block.W, 2**bits) if whole is None else whole
    index = torch.empty_like(block.W)

    def replace(W: Tensor, j: int) -> Tensor:
        index[:, j] = round_to_grid(W[j], params, 2**bits)
        return grid_values(index[:, j], params)

    return _Rounded(index, params, sweep_columns(block, replace))
