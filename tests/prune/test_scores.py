import pytest
import torch

from subbit.errors import RecipeError
from subbit.linalg import BlockView, factorize
from subbit.prune import METRICS, Scorer
from subbit.prune.scores import standardized_importance


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 12, generator=generator)
    X = torch.randn(100, 12, generator=generator)
    H = X.T @ X
    factor = factorize(H, 0.01)
    view = BlockView(W[:, 4:9], factor.U[4:9, 4:9], H[4:9, 4:9], 4, 9, ~factor.dead[4:9])
    return W, X, H, factor, view


def score(problem, metric, **kwargs):
    W, _, H, factor, view = problem
    return Scorer(metric, W, H, factor, **kwargs)(view)


def test_metrics_are_their_formulas(problem):
    W, X, _, factor, _ = problem
    block = W[:, 4:9]
    norm = X[:, 4:9].norm(dim=0)
    inverse = torch.linalg.inv(
        factor.H + factor.damping * factor.H.diagonal().mean() * torch.eye(12)
    )
    diagonal = inverse.diagonal()[4:9]
    close = dict(rtol=1e-4, atol=0)
    torch.testing.assert_close(score(problem, "magnitude"), block.abs())
    torch.testing.assert_close(score(problem, "wanda"), block.abs() * norm, **close)
    u = factor.U.diagonal()[4:9]
    torch.testing.assert_close(score(problem, "hessian"), block**2 / u**2, **close)
    printed = score(problem, "hessian", hessian_score="printed")
    torch.testing.assert_close(printed, block**2 / diagonal**2, **close)
    obs = score(problem, "hessian", hessian_score="obs")
    torch.testing.assert_close(obs, block**2 / (2 * diagonal), **close)


def test_standardised_importance_is_eq_3_of_stbllm(problem):
    W, X, *_ = problem
    a = W.abs().double()
    mu = a / a.sum(1, keepdim=True) + a / a.sum(0, keepdim=True)
    expected = ((mu - mu.mean()) / mu.std()) * X.double().norm(dim=0)
    torch.testing.assert_close(
        score(problem, "si").double(), expected[:, 4:9], rtol=1e-4, atol=1e-4
    )


def test_random_depends_on_seed_and_name_only(problem):
    before = torch.get_rng_state()
    a = score(problem, "random", seed=1, name="q")
    assert torch.equal(a, score(problem, "random", seed=1, name="q"))
    assert not torch.equal(a, score(problem, "random", seed=2, name="q"))
    assert not torch.equal(a, score(problem, "random", seed=1, name="k"))
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_metric_names_the_nearest(problem):
    with pytest.raises(RecipeError, match="wanda"):
        score(problem, "wandaa")
    assert len({str(score(problem, m)) for m in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_weight_has_a_score(metric):
    W, H = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    assert Scorer(metric, W, H, factorize(H, 0.01)).score(W).isfinite().all()


def test_standardised_importance_prefers_any_input_to_none():
    generator = torch.Generator().manual_seed(0)
    W, norms = torch.randn(6, 16, generator=generator), torch.rand(16, generator=generator) + 0.1
    norms[3] = norms[11] = 0
    W[:, norms == 0] = 0
    score = standardized_importance(W, norms)
    assert (score[:, norms == 0] == -torch.inf).all() and score[:, norms > 0].isfinite().all()
    alone = standardized_importance(W[:, norms > 0], norms[norms > 0])
    torch.testing.assert_close(score[:, norms > 0], alone)
    assert standardized_importance(W * 0, norms * 0).isfinite().all()
