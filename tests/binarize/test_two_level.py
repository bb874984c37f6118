import itertools

import pytest
import torch

import worked_example as example
from subbit.binarize.two_level import fit_alternating, fit_exact

ALL = torch.ones_like(example.MASK)


def error(fitted):
    return float((example.W - fitted).norm())


def test_the_six_figures_of_the_worked_example():
    assert error(example.PRINTED_DENSE) == pytest.approx(4.3851, abs=1e-4)
    assert error(example.PRINTED_PRUNED) == pytest.approx(3.8359, abs=1e-4)
    assert error(fit_alternating(example.W, ALL)) == pytest.approx(4.3228, abs=1e-4)
    assert error(fit_alternating(example.W, example.MASK)) == pytest.approx(3.9008, abs=1e-4)
    assert error(fit_exact(example.W, ALL)) == pytest.approx(3.7969, abs=1e-4)
    assert error(fit_exact(example.W, example.MASK)) == pytest.approx(3.7837, abs=1e-4)


def test_exact_fit_is_the_best_of_all_sign_patterns():
    W = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    support = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    fitted = fit_exact(W, support)
    for row in range(3):
        w = W[row][support[row]].double()
        best = float("inf") if len(w) else 0.0
        for signs in itertools.product((False, True), repeat=len(w)):
            high = torch.tensor(signs, dtype=torch.bool)
            parts = [w[m] for m in (high, ~high) if m.any()]
            best = min([best, sum(float((p - p.mean()).square().sum()) for p in parts)])
        got = float(((W[row] - fitted[row])[support[row]]).square().sum())
        assert got == pytest.approx(best, abs=1e-5)
    assert (fitted[~support] == 0).all()
