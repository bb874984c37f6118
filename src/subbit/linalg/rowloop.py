"""The block loop turned by a quarter: groups of rows, each group's error absorbed by the rest."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from subbit.linalg.blockloop import HasWeights, compensate
from subbit.linalg.cholesky import factorize

__all__ = ["run_rows"]


R = TypeVar("R", bound=HasWeights)


def run_rows(
    W: Tensor,
    G: Tensor,
    groups: int,
    percdamp: float,
    compress_rows: Callable[[Tensor, int], R],
) -> list[tuple[Tensor, R]]:
    """Compress the rows of `W` in groups, one after the other, where outputs feel each other.

    With `G = sum g^T g` of the gradients in a linear's outputs, an error E costs
    `tr((G + damping) E H E^T)` to second order, gradients and inputs taken as independent (K-FAC).
    Given the error of some rows, the rest do best to move by `-G_rr^-1 G_rd E_d`, whatever H is:
    the exact compensation of the block loop, with G in the place of H. Inside a group rows count
    as independent; a group takes every `groups`-th row, so that neighbours, which belong to one
    attention head, are in different ones.

    Args:
        W: float32 `(rows, cols)`; not modified.
        G: `(rows, rows)`.
        groups: groups of rows; 1 = G does nothing.
        percdamp: share of mean(diag G) that is added to its diagonal.
        compress_rows: makes the compressed form of a group's rows `(k, cols)`, given its number.

    Returns:
        For every group its rows, int64 `(k,)`, and what was made of them.
    """
    parts = [torch.arange(k, len(W), groups, device=W.device) for k in range(min(groups, len(W)))]
    order = torch.cat(parts)
    U = _factor(G[order][:, order], percdamp)
    W, start, found = W[order], 0, []
    for number, rows in enumerate(parts):
        stop = start + len(rows)
        made = compress_rows(W[start:stop], number)
        found.append((rows, made))
        if stop < len(W):
            E = (W[start:stop] - made.dequantize()).T
            own, rest = U[start:stop, start:stop], U[start:stop, stop:]
            W[stop:] -= compensate(E, own, rest, "exact").T
        start = stop
    return found


def _factor(G: Tensor, percdamp: float) -> Tensor:
    """U with `(G + damping)^-1 = U^T U`; rows that nobody feels count as the mean one, alone."""
    G = G.clone()
    diagonal = G.diagonal()
    unfelt = diagonal <= 0
    diagonal[unfelt] = 1.0 if bool(unfelt.all()) else float(diagonal[~unfelt].mean())
    return factorize(G, percdamp).U
