import itertools

import pytest
import torch

from subbit.binarize.salient import search_salient
from subbit.binarize.split import label_groups, search_splits


@pytest.fixture
def W():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 20, generator=generator) * (1 + 4 * torch.rand(20, generator=generator))


def plain_error(W, part):
    """Squared error of binarising each row's `part` to +-mean|w|, straight from the definition."""
    total = 0.0
    for row, mask in zip(W.double(), part):
        w = row[mask]
        if len(w):
            total += float((w.abs() - w.abs().mean()).square().sum())
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_salient_search_is_the_brute_force_optimum(W, masked):
    support = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < (
        0.6 if masked else 2
    )
    score = W.square()
    order = (score * support).sum(0).argsort(descending=True, stable=True)
    errors = []
    for k in range(1, 13):
        columns = torch.zeros(20, dtype=torch.bool)
        columns[order[:k]] = True
        errors.append(plain_error(W, support & columns) + plain_error(W, support & ~columns))
    best = errors.index(min(errors)) + 1
    chosen = search_salient(W, score, support, 12)
    assert int(chosen.sum()) == best
    assert set(chosen.nonzero().flatten().tolist()) == set(order[:best].tolist())


def test_salient_search_respects_its_limits(W):
    support = torch.ones_like(W, dtype=torch.bool)
    assert not search_salient(W, W.square(), support, 0).any()
    assert int(search_salient(W, W.square(), support, 1).sum()) == 1
    assert int(search_salient(W, W.square(), support, 1000).sum()) < W.shape[1]
    assert not search_salient(W[:, :1], W[:, :1].square(), support[:, :1], 50).any()


@pytest.mark.parametrize("points", [1, 2, 3])
def test_split_search_is_the_brute_force_optimum(W, points):
    support = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    found = search_splits(W, support, points=points, grid=(0.1, 0.9, 33), sigma=1.7)
    peak = float((W.abs() * support).max())
    best, best_error = None, float("inf")
    for i in torch.linspace(0.1, 0.9, 33, dtype=torch.float64):
        p = [float(i) * 1.7**j for j in range(points)]
        if p[-1] > 0.9:
            continue
        edges = [-1.0, *(x * peak for x in p), float("inf")]
        magnitude = W.abs()
        parts = [support & (magnitude > a) & (magnitude <= b) for a, b in itertools.pairwise(edges)]
        error = sum(plain_error(W, part) for part in parts)
        if error < best_error:
            best, best_error = [x * peak for x in p], error
    assert found.tolist() == pytest.approx(best, rel=1e-5)
    labels = label_groups(W, found)
    assert int(labels.max()) <= points
    assert ((labels == 0) == (W.abs() <= found[0])).all()


def test_split_search_without_weights_or_points(W):
    nothing = torch.zeros_like(W, dtype=torch.bool)
    assert search_splits(W, nothing, points=2, grid=(0.1, 0.9, 160), sigma=2.0).tolist() == [0, 0]
    everything = ~nothing
    assert search_splits(W, everything, points=0, grid=(0.1, 0.9, 160), sigma=2.0).shape == (0,)
