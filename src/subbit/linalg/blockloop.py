"""The one block loop: columns in blocks, left to right, each block's error absorbed by the rest.

OBC and GPTQ; the blockwise form of BiLLM, ARB-LLM, STBLLM and PBS2P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from subbit.errors import RecipeError
from subbit.linalg.cholesky import Factor

__all__ = ["COMPENSATIONS", "OBJECTIVES", "BlockView", "HasWeights", "compensate", "run_blocks"]

COMPENSATIONS = ("diagonal", "exact")
OBJECTIVES = ("gram", "schur")


@dataclass(frozen=True)
class BlockView:
    """What a method sees of one column block.

    Attributes:
        W: float32 `(rows, b)`, the weights as compensated so far.
        U: float32 `(b, b)`, the diagonal block of the factor U.
        S: float32 `(b, b)`, the quadratic form in which this block's error counts: H_bb
            ("gram", PBS2P Eq. 5-6) or its Schur complement `(U_b^T U_b)^-1` ("schur", what is
            left of the loss once the columns to the right have absorbed what they can).
        start, stop: the block's columns.
        live: bool `(b,)`, columns with inputs; weights elsewhere are 0 and decide nothing.
    """

    W: Tensor
    U: Tensor
    S: Tensor
    start: int
    stop: int
    live: Tensor


class HasWeights(Protocol):
    """Compressed columns or rows that can say which dense weights they mean."""

    def dequantize(self) -> Tensor:
        """Float32, as large as what was compressed."""
        ...


B = TypeVar("B", bound=HasWeights)


def run_blocks(
    W: Tensor,
    factor: Factor,
    blocksize: int,
    compress_block: Callable[[BlockView], B],
    *,
    compensation: str = "diagonal",
    objective: str = "gram",
) -> list[B]:
    """Compress `W` block by block and return the compressed blocks in order.

    Args:
        W: float32 `(rows, cols)`; not modified.
        factor: of this linear's H.
        blocksize: columns a block; the last one may be shorter.
        compress_block: makes the compressed form of one block.
        compensation: "diagonal" (published code of BiLLM, ARB-LLM, STBLLM: `E / diag(U_b)`) or
            "exact" (the optimum for the block's error: `E U_b^-1`).
        objective: which quadratic form the block sees as `S`.
    """
    if objective not in OBJECTIVES:
        raise RecipeError(f"objective is '{objective}'; use one of {', '.join(OBJECTIVES)}")
    W = factor.live(W)
    blocks: list[B] = []
    for start in range(0, W.shape[1], blocksize):
        stop = min(start + blocksize, W.shape[1])
        U_b = factor.U[start:stop, start:stop]
        S = factor.H[start:stop, start:stop] if objective == "gram" else _schur(U_b)
        live = ~factor.dead[start:stop]
        block = compress_block(BlockView(W[:, start:stop], U_b, S, start, stop, live))
        blocks.append(block)
        if stop < W.shape[1]:
            E = W[:, start:stop] - block.dequantize()
            W[:, stop:] -= compensate(E, U_b, factor.U[start:stop, stop:], compensation)
    return blocks


def compensate(E: Tensor, U_b: Tensor, U_rest: Tensor, how: str) -> Tensor:
    """Return what to subtract from the columns right of a block whose error is `E`.

    Args:
        E: `(rows, b)`, weights minus their replacement.
        U_b: `(b, b)`; U_rest: `(b, rest)`: rows of the factor U.
        how: "diagonal" or "exact"; exact minimises `tr(D H D^T)` over the rest given E.
    """
    if how == "diagonal":
        return (E / U_b.diagonal()) @ U_rest
    if how == "exact":
        return torch.linalg.solve_triangular(U_b, E, upper=True, left=False) @ U_rest
    raise RecipeError(f"compensation is '{how}'; use one of {', '.join(COMPENSATIONS)}")


def _schur(U_b: Tensor) -> Tensor:
    eye = torch.eye(U_b.shape[0], dtype=U_b.dtype, device=U_b.device)
    inverse = torch.linalg.solve_triangular(U_b, eye, upper=True)
    return inverse @ inverse.T
