import itertools

import pytest
import torch

from subbit.binarize.spbo import alternate, binarize_part, spbo
from subbit.prune import ranks_in_groups


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 16, generator=generator)
    X = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    support = torch.rand(5, 16, generator=generator) < 0.7
    support[4] = False
    return W, X.T @ X, support


def by_the_letter(W, S, M, B, mu, alpha, aware):
    """Earlier version, Algorithm 1: update_mu and update_alpha as double sums over k and j."""
    b = W.shape[0]
    one = M.double() if aware else torch.ones(b, dtype=torch.float64)
    P = sum(
        float(S[k, j]) * float(one[k]) * float(W[j] * M[j] - alpha * B[j] * M[j])
        for k in range(b)
        for j in range(b)
    )
    mu = P / float(one @ S.double() @ one)
    Bm = (B * M).double()
    numerator = Bm @ S.double() @ (W * M - mu * one)
    return mu, float(numerator / (Bm @ S.double() @ Bm))


@pytest.mark.parametrize("aware", [True, False])
def test_one_alternation_is_algorithm_1(problem, aware):
    W, S, support = problem
    ranks = ranks_in_groups(W.abs(), 8)
    part = binarize_part(W, support, 1)
    fitted = spbo(W, S, part, ranks, 1, tau=1, mask_aware=aware, target="retained")
    M = (support & (ranks >= 1)).float()
    for row in range(4):
        mu0, alpha0 = part.params[row].tolist()
        mu, alpha = by_the_letter(W[row], S, M[row], part.signs[row, 0], mu0, alpha0, aware)
        assert fitted.params[row].tolist() == pytest.approx([mu, alpha], rel=1e-4, abs=1e-5)


def test_plain_binarisation_is_mean_sign_and_mean_magnitude(problem):
    W, _, support = problem
    part = binarize_part(W, support, 2)
    w = W[0][support[0]]
    assert float(part.params[0, 0]) == pytest.approx(float(w.mean()), rel=1e-5)
    assert float(part.params[0, 1]) == pytest.approx(float((w - w.mean()).abs().mean()), rel=1e-5)
    assert (part.signs[0, 0][~support[0]] == 0).all()
    assert part.params[4].tolist() == [0, 0, 0]


def test_means_of_the_passes(problem):
    W, _, support = problem
    w = W[0][support[0]]
    none, once, twice = (binarize_part(W, support, 2, means=means) for means in (0, 1, 2))
    assert (none.params[:, 0] == 0).all()
    assert float(none.params[0, 1]) == pytest.approx(float(w.abs().mean()), rel=1e-5)
    left = w - once.params[0, 0] - once.params[0, 1] * once.signs[0, 0][support[0]]
    assert float(twice.params[0, 0]) == pytest.approx(float(once.params[0, 0] + left.mean()))
    second = float((left - left.mean()).abs().mean())
    assert float(twice.params[0, 2]) == pytest.approx(second, rel=1e-5)
    dense = twice.dense()
    assert (dense[~support] == 0).all()
    levels = {s * twice.params[0, 1] + t * twice.params[0, 2] for s in (-1, 1) for t in (-1, 1)}
    for value in dense[0][support[0]] - twice.params[0, 0]:
        assert min(abs(float(value - level)) for level in levels) < 1e-5


def loss(W, S, part, kept):
    mu, alpha = part.params[..., :1], part.params[..., 1:]
    R = (W - mu - (alpha.unsqueeze(-1) * part.signs).sum(-2)) * kept
    return ((R @ S) * R).sum(-1)


@pytest.mark.parametrize("planes", [1, 2])
def test_more_alternations_never_raise_the_loss_they_descend(problem, planes):
    W, S, support = problem
    ranks = ranks_in_groups(W.abs(), 8)
    kept = support & (ranks >= 3)
    part = binarize_part(W, kept, planes)
    losses = [loss(W, S, part, kept)]
    for tau in range(1, 9):
        fitted = spbo(W, S, part, ranks, 3, tau=tau, mask_aware=True, target="retained")
        losses.append(loss(W, S, fitted, kept))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5) + 1e-4).all()
    assert (losses[-1][:4] < losses[0][:4]).all()


def test_alternation_converges_to_the_joint_least_squares_solution(problem):
    W, S, support = problem
    part = binarize_part(W, support, 1)
    planes = torch.stack((support.float(), part.signs[:, 0]), 1)
    p = alternate(planes, W * support, S, part.params, 500)
    for row in range(4):
        V = planes[row].double()
        exact = torch.linalg.solve(
            V @ S.double() @ V.T, V @ S.double() @ (W * support)[row].double()
        )
        assert p[row].tolist() == pytest.approx(exact.tolist(), rel=1e-3, abs=1e-4)
    assert p[4].tolist() == [0, 0]


def test_full_target_differs_from_retained(problem):
    W, S, support = problem
    ranks = ranks_in_groups(W.abs(), 8)
    part = binarize_part(W, support, 1)
    a = spbo(W, S, part, ranks, 4, tau=5, mask_aware=True, target="retained")
    b = spbo(W, S, part, ranks, 4, tau=5, mask_aware=True, target="full")
    assert not torch.allclose(a.params[:4], b.params[:4])


@pytest.fixture
def centred():
    """Inputs as a LayerNorm without a bias gives them: those of a token add up to 0."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(600, 64, generator=generator) * (0.2 + torch.rand(64, generator=generator))
    X -= X.mean(1, keepdim=True)
    return 0.05 * torch.randn(24, 64, generator=generator), X.T @ X


@pytest.mark.parametrize("steps", [0, 4])
def test_a_plane_that_the_inputs_cancel_is_not_fitted_to_rounding_errors(centred, steps):
    W, S = centred
    ranks = ranks_in_groups(W.abs(), 8)
    kept = ranks >= steps
    part = binarize_part(W, torch.ones_like(kept), 1)
    fitted = spbo(W, S, part, ranks, steps, tau=10, mask_aware=False, target="retained")
    assert (fitted.params.abs() < 1).all()
    before, after = (loss(W, S, found, kept) for found in (part, fitted))
    assert after.sum() < before.sum()


def test_alternation_raises_no_loss_where_a_plane_is_not_felt(centred):
    """It keeps its parameter: 0 in its place would cost what is left of its weight."""
    W, S = centred
    W = W + 40
    part = binarize_part(W, torch.ones_like(W, dtype=torch.bool), 1)
    planes = torch.stack((part.support.float(), part.signs[:, 0]), 1)
    p = alternate(planes, W, S, part.params, 5)
    fitted = (p.unsqueeze(-1) * planes).sum(1)

    def error(found):
        R = (W - found).double()
        return ((R @ S.double()) * R).sum(-1)

    assert (error(fitted) <= error(part.dense()) * (1 + 1e-6)).all()
    assert torch.equal(p[:, 0], part.params[:, 0])
    assert not torch.equal(p[:, 1], part.params[:, 1])
