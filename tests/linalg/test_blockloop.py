from dataclasses import dataclass

import pytest
import torch

from subbit.errors import RecipeError
from subbit.linalg import compensate, factorize, run_blocks


@dataclass
class Rounded:
    values: torch.Tensor

    def dequantize(self):
        return self.values


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 22, generator=generator)
    X = torch.randn(300, 22, generator=generator) @ torch.randn(22, 22, generator=generator)
    return W, X.T @ X


def damped(factor):
    H = factor.H.double()
    return H + factor.damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def test_exact_compensation_is_the_dense_least_squares_optimum(problem):
    _, H = problem
    factor = factorize(H, 0.01)
    E = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    step = compensate(E, factor.U[:8, :8], factor.U[:8, 8:], "exact")
    # minimise tr(D H D^T) over D = (E, step) = W - W_hat: the normal equations of the rest
    A = damped(factor)
    best = -torch.linalg.solve(A[8:, 8:], A[8:, :8] @ E.double().T).T
    torch.testing.assert_close(step.double(), best, rtol=1e-3, atol=1e-4)


def test_diagonal_compensation_is_the_published_update(problem):
    _, H = problem
    U = factorize(H, 0.01).U
    E = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        compensate(E, U[:8, :8], U[:8, 8:], "diagonal"), (E / U.diagonal()[:8]) @ U[:8, 8:]
    )
    one = compensate(E[:, :1], U[:1, :1], U[:1, 1:], "exact")
    torch.testing.assert_close(one, compensate(E[:, :1], U[:1, :1], U[:1, 1:], "diagonal"))


def test_schur_objective_is_the_loss_left_after_exact_compensation(problem):
    W, H = problem
    factor = factorize(H, 0.01)
    seen = []

    def crush(block):
        seen.append(block)
        return Rounded(torch.zeros_like(block.W))

    run_blocks(W, factor, 8, crush, compensation="exact", objective="schur")
    first = seen[0]
    E = W[:, :8].double()
    rest = compensate(E.float(), first.U, factor.U[:8, 8:], "exact").double()
    D = torch.cat((E, rest), 1)
    left = torch.einsum("ni,ij,nj->n", D, damped(factor), D)
    form = torch.einsum("ni,ij,nj->n", E, first.S.double(), E)
    torch.testing.assert_close(form, left, rtol=1e-3, atol=1e-3)


def test_blocks_are_cut_where_they_should_and_w_is_left_alone(problem):
    W, H = problem
    before = W.clone()
    factor = factorize(H, 0.01)
    seen = []
    blocks = run_blocks(W, factor, 8, lambda b: seen.append(b) or Rounded(b.W.round()))
    assert [(b.start, b.stop) for b in seen] == [(0, 8), (8, 16), (16, 22)]
    assert [b.values.shape[1] for b in blocks] == [8, 8, 6]
    assert torch.equal(W, before)
    assert torch.equal(seen[1].S, factor.H[8:16, 8:16])


def test_compensation_lowers_the_loss(problem):
    W, H = problem
    factor = factorize(H, 0.01)
    losses = {}
    for how in ("diagonal", "exact"):
        blocks = run_blocks(W, factor, 4, lambda b: Rounded(b.W.round()), compensation=how)
        E = (W - torch.cat([b.values for b in blocks], 1)).double()
        losses[how] = float(torch.einsum("ni,ij,nj->", E, H.double(), E))
    E = (W - W.round()).double()
    losses["none"] = float(torch.einsum("ni,ij,nj->", E, H.double(), E))
    assert losses["exact"] < losses["diagonal"] < losses["none"]


def test_dead_columns_are_zeroed_and_options_checked(problem):
    W, H = problem
    H[3] = 0
    H[:, 3] = 0
    factor = factorize(H, 0.01)
    blocks = run_blocks(W, factor, 8, lambda b: Rounded(b.W))
    assert (blocks[0].values[:, 3] == 0).all()
    with pytest.raises(RecipeError, match="exact"):
        run_blocks(W, factor, 8, lambda b: Rounded(b.W), compensation="exakt")
    with pytest.raises(RecipeError, match="schur"):
        run_blocks(W, factor, 8, lambda b: Rounded(b.W), objective="shur")
