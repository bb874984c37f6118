import itertools

import pytest
import torch

from subbit.binarize.arb import nearest_signs, refine
from subbit.binarize.row_column import fit_row_column
from subbit.binarize.spbo import binarize_part


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(9, 24, generator=generator) * (0.3 + torch.rand(24, generator=generator))
    support = torch.rand(2, 9, 24, generator=generator) < 0.6
    support[0, 3] = False  # an empty row
    support[1, :, 5] = False  # and an empty column
    return W, support


def errors(W, support, W_hat):
    return ((W - W_hat) * support).square().sum((1, 2))


@pytest.mark.parametrize("planes", [1, 2])
def test_every_iteration_lowers_the_error(problem, planes):
    W, support = problem
    part = binarize_part(W, support, planes, means=planes)
    steps = [errors(W, support, refine(W, part, t).dense()) for t in range(12)]
    for before, after in itertools.pairwise(steps):
        assert (after <= before * (1 + 1e-5)).all()
    assert (steps[-1] < 0.99 * steps[0]).all()


@pytest.mark.parametrize("planes", [1, 2])
def test_a_refined_part_is_a_fixed_point(problem, planes):
    W, support = problem
    part = refine(W, binarize_part(W, support, planes), 300)
    left = (W - part.dense()) * support
    assert left.sum(-1).abs().max() < 1e-4  # the mean
    assert (part.signs * left.unsqueeze(-2)).sum(-1).abs().max() < 1e-4  # each alpha
    again = refine(W, part, 1)
    assert torch.equal(again.signs, part.signs)


@pytest.mark.parametrize("u", [0.7, 0.2, 0.0, -0.4])
@pytest.mark.parametrize("v", [0.5, 0.0, -0.9])
def test_nearest_signs_are_nearest(u, v):
    W = torch.linspace(-2, 2, 101).view(1, -1) + 1e-3
    first, second = nearest_signs(W, [torch.tensor([[u]]), torch.tensor([[v]])])
    reached = (W - u * first - v * second).abs()
    levels = torch.tensor([a * u + b * v for a in (-1, 1) for b in (-1, 1)])
    assert torch.allclose(reached, (W.unsqueeze(-1) - levels).abs().amin(-1), atol=1e-6)
    (only,) = nearest_signs(W, [torch.tensor([[u]])])
    assert torch.allclose((W - u * only).abs(), torch.minimum((W - u).abs(), (W + u).abs()))


@pytest.mark.parametrize("planes", [1, 2])
def test_row_and_column_scales_beat_row_scales_and_keep_improving(problem, planes):
    W, support = problem
    plain = errors(W, support, binarize_part(W, support, planes, means=0).dense())
    few = errors(W, support, fit_row_column(W, support, planes, 1).dense())
    many = errors(W, support, fit_row_column(W, support, planes, 15).dense())
    assert (few < plain).all() and (many < few).all()


def test_row_and_column_scales_find_a_product_exactly():
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.rand(8, 1, generator=generator), torch.rand(1, 16, generator=generator)
    W = torch.where(torch.rand(8, 16, generator=generator) < 0.5, 1, -1) * rows * columns
    part = fit_row_column(W, torch.ones(1, 8, 16, dtype=torch.bool), 1, 15)
    assert torch.allclose(part.dense()[0], W, atol=1e-6)


def test_empty_rows_and_columns_are_zero(problem):
    W, support = problem
    for part in (
        refine(W, binarize_part(W, support, 2), 15),
        fit_row_column(W, support, 2, 15),
        fit_row_column(W * 0, support, 2, 15),
    ):
        W_hat = part.dense()
        assert torch.isfinite(W_hat).all()
        assert (W_hat[~support] == 0).all()
