"""Which weights of a block share a scale: salient columns, and groups by size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binarize.arb import refine
from subbit.binarize.salient import search_salient, search_salient_scores
from subbit.binarize.spbo import binarize_part
from subbit.binarize.split import (
    label_groups,
    peak_candidates,
    quantile_candidates,
    search_splits,
    search_splits_on_inputs,
)

__all__ = ["Groups", "Split", "group_scores", "group_weights"]

_ITERATIONS = 15  # of ARB on the salient scores, whatever the method's own number


@dataclass(frozen=True)
class Split:
    """How split points are searched.

    Attributes:
        points: number of split points; groups - 1.
        grid: first candidate, last candidate (as shares), and how many.
        sigma: ratio of consecutive split points; inf = every choice of points (naive search).
    """

    points: int
    grid: tuple[float, float, int]
    sigma: float = 2.0


@dataclass(frozen=True)
class Groups:
    """The groups of one block.

    Attributes:
        salient: bool `(b,)`.
        labels: uint8 `(rows, b)`: group among the ordinary or among the salient weights,
            smallest first.
        ordinary_count, salient_count: number of groups of either.
    """

    salient: Tensor
    labels: Tensor
    ordinary_count: int
    salient_count: int = 1

    def supports(self, salient: bool) -> Tensor:
        """Where each group of the salient or the ordinary columns is; bool `(groups, rows, k)`."""
        columns, count = (
            (self.salient, self.salient_count) if salient else (~self.salient, self.ordinary_count)
        )
        labels = self.labels[:, columns]
        group = torch.arange(count, dtype=labels.dtype, device=labels.device)
        return labels == group[:, None, None]


def group_weights(
    W: Tensor, score: Tensor, support: Tensor, *, limit: int, split: Split, split_salient: bool
) -> Groups:
    """Group a block as the papers print it: by the size of its weights.

    Args:
        W: float32 `(rows, b)`.
        score: importance of the weights; its column sums order the salient columns.
        support: bool `(rows, b)`: the weights that count.
        limit: most salient columns.
        split: of the ordinary weights.
        split_salient: also part the salient weights in two (ARB-LLM's column-group bitmap).
    """
    salient = search_salient(W, score, support, limit)
    magnitude = W.abs()
    labels = torch.zeros_like(W, dtype=torch.uint8)

    def label(columns: Tensor, how: Split) -> None:
        values, counted = magnitude[:, columns], support[:, columns]
        candidates = peak_candidates(
            values, counted, points=how.points, grid=how.grid, sigma=how.sigma
        )
        labels[:, columns] = label_groups(values, search_splits(values, counted, candidates))

    label(~salient, split)
    if split_salient and bool(salient.any()):
        label(salient, Split(1, split.grid, split.sigma))
    return Groups(salient, labels, split.points + 1, 1 + split_salient)


def group_scores(
    score: Tensor, *, limit: int, split: Split, split_salient: bool, S: Tensor | None = None
) -> Groups:
    """Group a block as published code does: everything is searched on the score matrix.

    The split points of the ordinary weights are quantiles of the whole block, its salient columns
    taken as zeros; those of the salient weights are quantiles of these alone that are not zero. A
    score at a split point belongs above it.

    Args:
        score: importance of the weights, float32 `(rows, b)`, >= 0.
        limit, split, split_salient: as in `group_weights`.
        S: the quadratic form `(b, b)` in which the ordinary split's error of the whole block
            counts (ARB-X); None = squared error.
    """
    salient = search_salient_scores(score, limit)
    labels = torch.zeros_like(score, dtype=torch.uint8)

    def label(columns: Tensor, how: Split, planes: int, pool: Tensor) -> None:
        values, support = score * columns, columns.expand_as(score)
        candidates = quantile_candidates(
            values, pool, points=how.points, grid=how.grid, sigma=how.sigma
        )
        candidates = candidates.nextafter(torch.full_like(candidates, -torch.inf))
        if S is None or planes > 1:
            splits = search_splits(values, support, candidates, planes=planes, means=planes)
        else:
            rest = _salient_residual(score, salient)
            splits = search_splits_on_inputs(values, support, candidates, rest, S)
        labels[:, columns] = label_groups(score[:, columns], splits)

    label(~salient, split, 1, torch.ones_like(salient))
    if split_salient and bool(salient.any()):
        label(salient, Split(1, split.grid, split.sigma), 2, salient & (score > 0))
    return Groups(salient, labels, split.points + 1, 1 + split_salient)


def _salient_residual(score: Tensor, salient: Tensor) -> Tensor:
    """What ARB's two planes leave of the scores of the salient columns, 0 elsewhere."""
    part = binarize_part(score, salient.expand_as(score), 2, means=2)
    return score * salient - refine(score, part, _ITERATIONS).dense()
