"""Inside a block: column by column, each column's error absorbed by the columns right of it.

OBC; the inner loop of GPTQ and SparseGPT.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subbit.linalg.blockloop import BlockView

__all__ = ["sweep_columns"]


def sweep_columns(block: BlockView, replace: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Replace the columns of a block from left to right.

    After column j, with error e = w_j - q_j, every column k > j of the block loses
    `e U_jk / U_jj`, the optimum given that error. Followed by the "exact" compensation of the block
    loop this is column-wise compensation of the whole matrix: the errors of the block times
    `U_b^-1` are the `e / U_jj` met here.

    Args:
        block: its weights and factor; not modified.
        replace: given the block's weights as compensated so far, transposed, float32 `(b, rows)`,
            and the column j, returns what column j becomes, `(rows,)`.

    Returns:
        What the block becomes, float32 `(rows, b)`.
    """
    replaced = torch.empty_like(block.W)
    W = block.W.T.contiguous()
    diagonal = block.U.diagonal().tolist()
    for j, u in enumerate(diagonal):
        replaced[:, j] = replace(W, j)
        error = (W[j] - replaced[:, j]) / u
        W[j + 1 :].addr_(block.U[j, j + 1 :], error, alpha=-1)
    return replaced
