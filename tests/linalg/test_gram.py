import pytest
import torch

from subbit.linalg import GramAccumulator, relative_loss


def test_sums_do_not_depend_on_the_batches():
    X = torch.randint(-8, 9, (40, 6), generator=torch.Generator().manual_seed(0)).float()
    whole, parts = GramAccumulator(6), GramAccumulator(6)
    whole.add(X)
    for x in X.view(4, 10, 6).to(torch.bfloat16):
        parts.add(x.unsqueeze(0))
    assert torch.equal(whole.H, X.T @ X)
    assert torch.equal(parts.H, whole.H)
    assert parts.tokens == whole.tokens == 40


def test_relative_loss_is_the_relative_output_error():
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    W_hat = W.round()
    expected = float((X @ (W - W_hat).T).square().sum() / (X @ W.T).square().sum())
    assert relative_loss(W, W_hat, X.T @ X) == pytest.approx(expected, rel=1e-4)
    assert relative_loss(W, W, X.T @ X) == 0
    assert relative_loss(W * 0, W * 0, X.T @ X) == 0


def test_stripes_make_the_whole_symmetric_matrix():
    X = torch.randint(-3, 4, (30, 600), generator=torch.Generator().manual_seed(0)).float()
    gram = GramAccumulator(600)
    gram.add(X)
    assert torch.equal(gram.H, X.T @ X)
    assert torch.equal(gram.H, gram.H.T)
