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


def test_mean_and_total_are_weighed_as_H_is():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator) + 1
    weight = torch.randint(1, 5, (40,), generator=generator)
    gram, repeated = GramAccumulator(6), GramAccumulator(6)
    gram.add(X[:25], weight[:25].float())
    gram.add(X[25:], weight[25:].float())
    repeated.add(X.repeat_interleave(weight, 0))  # to count twice is to be seen twice
    assert gram.tokens == 40 and gram.weight == repeated.weight == repeated.tokens
    assert torch.allclose(gram.H, repeated.H, rtol=1e-5)
    assert torch.allclose(gram.mean, repeated.mean, rtol=1e-5)
    assert GramAccumulator(6).mean.tolist() == [0] * 6
