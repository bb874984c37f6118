"""Free levels are those of least squared error, compiled or not; one scale is its own mean."""

import itertools

import pytest
import torch

from subbit.binarize import descent, levels
from subbit.binarize.levels import fit_levels, fit_scale


@pytest.fixture(params=["compiled", "torch"])
def either(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("SUBBIT_DESCENT", "off")
    elif not descent.is_compiled():
        pytest.skip("the compiled steps were not built")


def problem(rows=5, cols=9, share=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator) ** 3
    keep = torch.rand(rows, cols, generator=generator) < share
    return W, keep, 0.1 + torch.rand(cols, generator=generator)


def error(W, keep, weight, codes, levels):
    values = torch.cat((torch.zeros(len(W), 1), levels), 1).gather(1, codes)
    return ((W - values).square() * weight * keep).sum(1)


def least(w, mass, count):
    """The smallest error over all ways to cut sorted weights into at most `count` runs."""
    order = w.argsort()
    w, mass = w[order].double(), mass[order].double()
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(w)), min(count, len(w)) - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(w))):
            part, m = w[start:stop], mass[start:stop]
            total += float((m * (part - (m * part).sum() / m.sum()) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_levels_have_a_smaller_error(count, either):
    for seed in range(4):
        W, keep, weight = problem(seed=seed)
        codes, levels = fit_levels(W, keep, count, weight)
        found = error(W, keep, weight, codes, levels)
        for row in range(len(W)):
            kept = keep[row]
            if kept.any():
                best = least(W[row][kept], weight[kept], count)
                assert float(found[row]) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_codes_name_the_nearest_level_and_levels_ascend(either):
    W, keep, weight = problem(40, 128)
    codes, levels = fit_levels(W, keep, 7, weight)
    assert torch.equal(codes > 0, keep)
    assert torch.equal(levels, levels.sort(1).values)
    distance = (W[..., None] - levels[:, None]).abs()
    chosen = distance.gather(-1, (codes - 1).clamp_min(0)[..., None]).squeeze(-1)
    assert torch.equal(chosen[keep], distance.amin(-1)[keep])


def test_rows_with_few_weights_or_none(either):
    W, keep, weight = problem(4, 8)
    keep[0], keep[1], keep[2] = False, torch.arange(8) == 3, torch.arange(8) < 2
    codes, levels = fit_levels(W, keep, 4, weight)
    assert torch.equal(levels[0], torch.zeros(4)) and not codes[0].any()
    assert torch.equal(levels[1], W[1, 3].expand(4))
    assert torch.allclose(error(W, keep, weight, codes, levels)[:3], torch.zeros(3), atol=1e-10)
    assert torch.isfinite(levels).all()


def test_the_compiled_fit_is_the_torch_fit(monkeypatch):
    if not descent.is_compiled():
        pytest.skip("the compiled steps were not built")
    for rows, cols, count in ((1, 8, 3), (70, 128, 7), (30, 100, 16)):
        W, keep, weight = problem(rows, cols, seed=rows)
        compiled = fit_levels(W, keep, count, weight)
        monkeypatch.setenv("SUBBIT_DESCENT", "off")
        ours = fit_levels(W, keep, count, weight)
        monkeypatch.undo()
        torch.testing.assert_close(compiled[1], ours[1], rtol=1e-5, atol=1e-6)
        assert (compiled[0] == ours[0]).float().mean() > 0.999


def test_wide_blocks_are_left_to_torch():
    W, keep, weight = problem(2, 300)
    codes, found = fit_levels(W, keep, 5, weight)
    assert error(W, keep, weight, codes, found).sum() > 0 and codes.max() == 5


def test_wide_blocks_take_little_memory(monkeypatch):
    sizes, real = [], levels._exact

    def watched(ascending, *args):
        sizes.append(len(ascending) * ascending.shape[1] ** 2)
        return real(ascending, *args)

    monkeypatch.setattr(levels, "_exact", watched)
    W = torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    codes, _ = fit_levels(W, torch.ones(40, 600, dtype=torch.bool), 3, torch.ones(600))
    assert max(sizes) <= 2**20 and codes.shape == W.shape


@pytest.mark.parametrize("zero", [False, True])
def test_one_scale_is_the_mean_of_what_it_stands_for(zero):
    W, keep, weight = problem(6, 40)
    codes, alpha = fit_scale(W, keep, zero, weight)
    values = torch.cat((-alpha, 0 * alpha, alpha) if zero else (-alpha, alpha), 1)
    assert torch.equal(codes > 0, keep)
    counted = keep & (values.gather(1, (codes - 1).clamp_min(0)) != 0)
    mass = counted * weight
    mean = (mass * W.abs()).sum(1) / mass.sum(1)
    assert torch.allclose(mean, alpha[:, 0], rtol=1e-3)
