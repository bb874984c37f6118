"""Rows that make up for each other's errors, where their outputs feel each other."""

from dataclasses import dataclass

import pytest
import torch

from subbit.linalg import run_rows


@dataclass
class Rounded:
    values: torch.Tensor

    def dequantize(self):
        return self.values


def rounded(rows, group):
    return Rounded(rows.round())


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W = 2 * torch.randn(22, 40, generator=generator)
    X = torch.randn(300, 40, generator=generator)
    g = torch.randn(500, 6, generator=generator) @ torch.randn(6, 22, generator=generator)
    return W, X.T @ X, g.T @ g


def joined(parts):
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([part.values for _, part in parts])[order]


def cost(E, G, H):
    return float((G @ E @ H * E).sum())


def test_the_rest_moves_to_the_dense_least_squares_optimum(problem):
    W, _, G = problem
    seen = []

    def crush(rows, group):
        assert group == len(seen)
        seen.append(rows.clone())
        return Rounded(torch.zeros_like(rows))

    (first, _), (second, _) = run_rows(W, G, 2, 0.1, crush)
    damped = G.double() + 0.1 * G.diagonal().mean() * torch.eye(22, dtype=torch.float64)
    # minimise tr(G E H E^T) over the rows of the second group, given E = W in the first
    A, B = damped[second][:, second], damped[second][:, first]
    move = torch.linalg.solve(A, B @ W[first].double())
    assert torch.equal(seen[0], W[first])
    torch.testing.assert_close(seen[1].double(), W[second] + move, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [2, 8, 22, 100])
def test_rounding_costs_less_than_row_by_row(problem, groups):
    W, H, G = problem
    parts = run_rows(W, G, groups, 0.01, rounded)
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(22))
    alone, together = cost(W - W.round(), G, H), cost(W - joined(parts), G, H)
    assert together < 0.95 * alone


def test_one_group_and_rows_that_nobody_feels_are_taken_as_they_are(problem):
    W, _, G = problem
    assert torch.equal(joined(run_rows(W, G, 1, 0.1, rounded)), W.round())
    assert torch.equal(joined(run_rows(W, torch.zeros_like(G), 4, 0.1, rounded)), W.round())
    G[3], G[:, 3] = 0, 0
    assert torch.equal(joined(run_rows(W, G, 4, 0.1, rounded))[3], W[3].round())


def test_the_weights_are_not_changed(problem):
    W, _, G = problem
    before = W.clone()
    run_rows(W, G, 4, 0.1, rounded)
    assert torch.equal(W, before)
