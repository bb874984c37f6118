"""Linears to compress in tests: ordinary ones and every kind that breaks careless code."""

import torch

from subbit.methods import LinearStats

__all__ = ["PROBLEMS", "large_problem", "problem"]


def _base(rows=24, cols=160, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    X = torch.randn(tokens, cols, generator=generator) @ mixing
    return 0.05 * W, X * (0.2 + 3 * torch.rand(cols, generator=generator))


def _ragged():
    return _base(cols=92)  # the last block has 28 columns, the last group of eight 4


def _narrow():
    return _base(rows=5, cols=11)


def _single_row():
    return _base(rows=1, cols=64)


def _rank_deficient():
    return _base(tokens=20)


def _one_token():
    return _base(tokens=1)


def _dead_columns():
    W, X = _base()
    X[:, 3:19] = 0
    return W, X


def _no_input():
    W, X = _base()
    return W, X * 0


def _zero_rows():
    W, X = _base()
    W[2:5] = 0
    return W, X


def _zero_weight():
    W, X = _base()
    return W * 0, X


def _constant():
    W, X = _base()
    return W * 0 + 0.25, X


def _outliers():
    W, X = _base()
    W[3, 40] = 30.0
    X[:, 40] *= 50
    return W, X


PROBLEMS = {
    "plain": _base,
    "ragged": _ragged,
    "narrow": _narrow,
    "single_row": _single_row,
    "rank_deficient": _rank_deficient,
    "one_token": _one_token,
    "dead_columns": _dead_columns,
    "no_input": _no_input,
    "zero_rows": _zero_rows,
    "zero_weight": _zero_weight,
    "constant": _constant,
    "outliers": _outliers,
}


def problem(name: str) -> tuple[torch.Tensor, LinearStats]:
    """A weight and its statistics."""
    W, X = PROBLEMS[name]()
    return W, LinearStats(X.T @ X, len(X), f"test.{name}", X.mean(0))


def large_problem() -> tuple[torch.Tensor, LinearStats]:
    """An ordinary one whose work is worth sharing among threads; its last block is ragged."""
    W, X = _base(rows=320, cols=576, tokens=700)
    return W, LinearStats(X.T @ X, len(X), "test.large", X.mean(0))
