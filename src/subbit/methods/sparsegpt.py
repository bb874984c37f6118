"""SparseGPT: massive language models pruned in one shot (Frantar, Alistarh, 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.codes import SparseLinear
from subbit.linalg import BlockView, factorize, run_blocks, sweep_columns
from subbit.methods.base import LinearStats, Method, damping_record
from subbit.methods.pruned import PruningOptions, sparse_linear
from subbit.prune import select

__all__ = ["SparseGPT"]


class SparseGPT(Method):
    """Prune column by column; the columns to the right absorb each column's error.

    Algorithm 1 of the paper: the score is that of OBS, `w_ij^2 / U_jj^2` with `H^-1 = U^T U`, on
    the weights as compensated so far ("adaptive mask selection"). N:M: chosen at the first column
    of each group of M; unstructured: at the first of each block, the highest scores of the whole
    block; structured, our extension: there too, the columns of the highest sums.
    """

    name = "sparsegpt"
    paper = "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
    year = 2023
    summary = "keeps the highest Hessian scores, later columns absorb each column's error"
    Opt = PruningOptions
    options: PruningOptions

    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None) -> SparseLinear:
        factor = factorize(stats.H, self.settings.percdamp)
        pruning = self.options.pruning
        blocks = run_blocks(
            W,
            factor,
            self.settings.blocksize,
            lambda block: _prune_block(block, nm, pruning),
            compensation="exact",
        )
        mask = torch.cat([block.mask for block in blocks], 1)
        kept = torch.cat([block.W for block in blocks], 1)
        return sparse_linear(kept, mask, nm, pruning, damping_record(factor))


@dataclass(frozen=True)
class _PrunedBlock:
    """A block's kept weights, float32 `(rows, b)`, 0 where pruned, and the mask."""

    W: Tensor
    mask: Tensor

    def dequantize(self) -> Tensor:
        return self.W


def _prune_block(block: BlockView, nm: tuple[int, int], pruning: str) -> _PrunedBlock:
    diagonal = block.U.diagonal()
    mask = torch.empty_like(block.W, dtype=torch.bool)
    step = nm[1] if pruning == "semi-structured" else block.W.shape[1]

    def replace(W: Tensor, j: int) -> Tensor:
        if j % step == 0:
            columns = slice(j, j + step)
            score = (W[columns] / diagonal[columns, None]).square().T
            mask[:, columns] = select(score, nm, pruning, by_row=False)
        return W[j] * mask[:, j]

    return _PrunedBlock(sweep_columns(block, replace), mask)
