import itertools

import pytest
import torch

from subbit.binarize.arb import refine
from subbit.binarize.groups import Split, group_scores, group_weights
from subbit.binarize.salient import column_limit, search_salient, search_salient_scores
from subbit.binarize.spbo import binarize_part
from subbit.binarize.split import (
    label_groups,
    peak_candidates,
    quantile_candidates,
    search_splits,
    search_splits_on_inputs,
)


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
    candidates = peak_candidates(W.abs(), support, points=points, grid=(0.1, 0.9, 33), sigma=1.7)
    found = search_splits(W.abs(), support, candidates)
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
    labels = label_groups(W.abs(), found)
    assert int(labels.max()) <= points
    assert ((labels == 0) == (W.abs() <= found[0])).all()


def test_split_search_without_weights_or_points(W):
    nothing = torch.zeros_like(W, dtype=torch.bool)
    grid = (0.1, 0.9, 160)
    none = peak_candidates(W.abs(), nothing, points=2, grid=grid, sigma=2.0)
    assert search_splits(W.abs(), nothing, none).tolist() == [0, 0]
    everything = peak_candidates(W.abs(), ~nothing, points=0, grid=grid, sigma=2.0)
    assert search_splits(W.abs(), ~nothing, everything).shape == (0,)
    assert quantile_candidates(W.abs(), nothing, points=1, grid=grid, sigma=2.0).sum() == 0


def binarized_error(W, parts, planes, means):
    """Squared error of binarising the parts, from the binarisation itself."""
    return sum(
        float(((W - binarize_part(W, part, planes, means=means).dense()) * part).square().sum())
        for part in parts
    )


@pytest.mark.parametrize("planes", [1, 2])
def test_splits_of_scores_are_the_brute_force_optimum(W, planes):
    score = W.square()
    support = torch.rand(W.shape, generator=torch.Generator().manual_seed(4)) < 0.8
    candidates = quantile_candidates(score, support, points=2, grid=(0.1, 0.9, 9), sigma=2.0)
    errors = [
        binarized_error(
            score,
            [support & (label_groups(score, splits) == group) for group in range(3)],
            planes,
            planes,
        )
        for splits in candidates
    ]
    found = search_splits(score, support, candidates, planes=planes, means=planes)
    assert found.tolist() == candidates[errors.index(min(errors))].tolist()


def test_quantile_candidates_are_quantiles(W):
    everything = torch.ones_like(W, dtype=torch.bool)
    shares = torch.linspace(0.1, 0.9, 17).double()
    expected = torch.quantile(W.abs().flatten().double(), shares).float()
    found = quantile_candidates(W.abs(), everything, points=1, grid=(0.1, 0.9, 17), sigma=2.0)
    assert found[:, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    two = quantile_candidates(W.abs(), everything, points=2, grid=(0.1, 0.9, 17), sigma=2.0)
    assert 0 < len(two) < 17 and (two[:, 1] == 2 * two[:, 0]).all()
    assert two.max() <= expected[-1]


def test_the_naive_search_is_never_worse_than_the_trisection(W):
    support = torch.ones_like(W, dtype=torch.bool)
    grid = (0.1, 0.9, 33)  # sigma = 2 stays on this grid
    tied = peak_candidates(W.abs(), support, points=2, grid=grid, sigma=2.0)
    free = peak_candidates(W.abs(), support, points=2, grid=grid, sigma=float("inf"))
    assert len(free) == 33 * 32 // 2
    results = []
    for candidates in (tied, free):
        labels = label_groups(W.abs(), search_splits(W.abs(), support, candidates))
        results.append(sum(plain_error(W, labels == group) for group in range(3)))
    assert results[1] < results[0]


def test_salient_search_of_scores_is_the_brute_force_optimum(W):
    score = W.square()
    order = score.sum(0).argsort(descending=True, stable=True)
    errors = []
    for k in range(1, 13):
        columns = torch.zeros(20, dtype=torch.bool)
        columns[order[:k]] = True
        head, rest = columns.expand_as(W), ~columns.expand_as(W)
        errors.append(binarized_error(score, [head], 2, 2) + binarized_error(score, [rest], 2, 2))
    chosen = search_salient_scores(score, 12)
    assert int(chosen.sum()) == errors.index(min(errors)) + 1
    assert not search_salient_scores(score, 0).any()
    assert int(search_salient_scores(score, 1000).sum()) < 20


@pytest.mark.parametrize("split_salient", [False, True])
@pytest.mark.parametrize("on_scores", [False, True])
def test_groups_part_the_block(W, split_salient, on_scores):
    split = Split(2, (0.1, 0.9, 40))
    if on_scores:
        groups = group_scores(W.square(), limit=9, split=split, split_salient=split_salient)
    else:
        support = torch.ones_like(W, dtype=torch.bool)
        groups = group_weights(
            W, W.square(), support, limit=9, split=split, split_salient=split_salient
        )
    assert 0 < int(groups.salient.sum()) <= 9
    for salient, count in ((False, 3), (True, 1 + split_salient)):
        supports = groups.supports(salient)
        columns = groups.salient if salient else ~groups.salient
        assert supports.shape == (count, 7, int(columns.sum()))
        assert (supports.sum(0) == 1).all() and supports.any((1, 2)).all()
        sizes = W.abs()[:, columns]
        if not on_scores:
            for low, high in itertools.pairwise(supports):
                assert sizes[low].max() < sizes[high].min()


def on_inputs_error(score, salient, groups, S):
    """Error under S of a block whose salient scores are ARB's two planes, the others one each."""
    head = salient.expand_as(score)
    R = score - refine(score, binarize_part(score, head, 2, means=2), 15).dense()
    for group in groups:
        R = R - binarize_part(score, group & ~head, 1, means=1).dense()
    return float(torch.einsum("ri,ij,rj->", R, S, R))


@pytest.mark.parametrize("cols", [128, 72, 64, 20])
def test_published_groups_of_blocks_of_any_width(cols):
    """1 to 49 salient columns whatever the width; quantiles of the whole block; ties go up."""
    generator = torch.Generator().manual_seed(cols)
    loud = torch.rand(cols, generator=generator).exp()
    score = torch.randn(33, cols, generator=generator).square() * loud
    X = torch.randn(200, cols, generator=generator)
    S = X.T @ X
    groups, on_inputs = (
        group_scores(score, limit=49, split=Split(1, (0.1, 0.9, 81)), split_salient=False, S=form)
        for form in (None, S)
    )
    order = score.sum(0).argsort(descending=True)
    errors = []
    for k in range(1, min(50, cols)):
        head = (torch.arange(cols)[:, None] == order[:k]).any(1).expand_as(score)
        errors.append(binarized_error(score, [head, ~head], 2, 2))
    count = errors.index(min(errors)) + 1
    assert set(groups.salient.nonzero().flatten().tolist()) == set(order[:count].tolist())
    assert torch.equal(groups.salient, on_inputs.salient)
    left = score * ~groups.salient
    found = {}
    for q in torch.linspace(0.1, 0.9, 81, dtype=torch.float64):
        point = torch.quantile(left.double(), q).float()
        upper = (left >= point) & ~groups.salient
        parts = [~upper & ~groups.salient, upper]
        plain = binarized_error(score, parts, 1, 1)
        found.setdefault("plain", []).append((plain, upper))
        error = on_inputs_error(score, groups.salient, parts, S)
        found.setdefault("inputs", []).append((error, upper))
    for how, ours in (("plain", groups), ("inputs", on_inputs)):
        upper = min(found[how], key=lambda pair: pair[0])[1]
        assert torch.equal(ours.supports(False)[1], upper[:, ~ours.salient])


def test_a_score_at_a_published_split_point_is_above_it():
    score = torch.arange(1.0, 12.0).square()[None].repeat(3, 1)  # the quantiles are scores
    groups = group_scores(score, limit=0, split=Split(1, (0.5, 0.5, 1)), split_salient=False)
    assert groups.labels[0].tolist() == [0] * 5 + [1] * 6


def test_the_split_search_on_inputs_sees_the_inputs():
    values = torch.tensor([[0.0, 0.1, 1.0, 1.1, 5.0, 5.1]])
    candidates = torch.tensor([[0.5], [2.0]])
    everything, rest = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)
    chosen = []
    for loud in (slice(0, 4), slice(4, 6)):
        S = torch.full((6,), 1e-3)
        S[loud] = 1.0
        found = search_splits_on_inputs(values, everything, candidates, rest, torch.diag(S))
        chosen.append(float(found))
    assert chosen[0] != chosen[1]


def test_every_block_may_have_the_same_share_of_salient_columns():
    assert column_limit(50, 128) == 50
    assert [column_limit(50, width) for width in (32, 64, 576)] == [12, 25, 225]
