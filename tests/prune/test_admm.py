"""ADMM and the re-fit on its mask do what they are for."""

import pytest
import torch

from subbit.prune import select
from subbit.prune.admm import admm, conjugate_gradients


def _problem(rows=12, cols=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    H = X.T @ X
    H.diagonal().add_(0.01 * H.diagonal().mean())
    norm = H.diagonal().sqrt()
    return torch.randn(rows, cols, generator=g), H / norm / norm[:, None]


def _loss(B, W, H):
    return float((((B - W) @ H) * (B - W)).sum())


def _nm(B):
    return select(B.square(), (4, 8))


def test_the_copies_come_together_and_the_mask_is_that_of_the_projection():
    W, H = _problem()
    found = admm(W, H, _nm)
    assert found.residuals[-1] < 0.1 * max(found.residuals)
    assert len(found.residuals) < 300
    assert (found.mask.view(12, -1, 8).sum(-1) == 4).all()


def test_it_finds_a_better_mask_than_the_projection_of_the_weights():
    W, H = _problem()
    found = admm(W, H, _nm)
    plain = conjugate_gradients(H, W @ H, _nm(W), W * _nm(W), 200)
    better = conjugate_gradients(H, W @ H, found.mask, found.B * found.mask, 200)
    assert _loss(better, W, H) < 0.9 * _loss(plain, W, H)


def test_nothing_to_prune_gives_the_weights_back():
    W, H = _problem()
    found = admm(W, H, lambda B: torch.ones_like(B, dtype=torch.bool))
    fitted = conjugate_gradients(H, W @ H, found.mask, found.B, 0)
    assert torch.allclose(fitted, W, atol=1e-2)


def test_conjugate_gradients_reach_the_least_squares_solution_of_every_row():
    W, H = _problem(5, 16)
    mask = _nm(W)
    fitted = conjugate_gradients(H, W @ H, mask, W * mask, 100)
    assert not fitted[~mask].any()
    for row in range(5):
        kept = mask[row]
        exact = torch.linalg.solve(H[kept][:, kept].double(), (W @ H)[row, kept].double())
        assert torch.allclose(fitted[row, kept].double(), exact, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_more_steps_never_fit_worse(steps):
    W, H = _problem()
    mask = _nm(W)
    losses = [
        _loss(conjugate_gradients(H, W @ H, mask, W * mask, count), W, H)
        for count in (0, steps, steps + 5)
    ]
    assert losses == sorted(losses, reverse=True)


def test_zeros_stay_finite():
    W, H = _problem()
    found = admm(W * 0, H, _nm)
    fitted = conjugate_gradients(H, W * 0, found.mask, found.B * found.mask, 5)
    assert torch.equal(fitted, W * 0)
