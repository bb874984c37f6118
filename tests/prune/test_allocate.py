import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subbit.errors import RecipeError
from subbit.prune.allocate import ALLOCATIONS, _savings, allocate, allocate_measured, mean_kept


def test_the_most_important_block_keeps_most():
    # importance = 1 / similarity: the block that changes its input most keeps N + 1
    kept = allocate([0.9, 0.2, 0.99], [1, 1, 1], (6, 8))
    assert kept == [6, 7, 5]


def test_eq_8_over_thirty_blocks():
    kept = allocate([i / 30 + 0.01 for i in range(30)], [1] * 30, (4, 8))
    assert kept == sorted(kept, reverse=True)
    assert (kept.count(5), kept.count(4), kept.count(3)) == (8, 14, 8)
    assert mean_kept(kept, [1] * 30) == 4


def test_the_budget_holds_with_unequal_sizes():
    sizes = [1000, 1, 1, 1]
    kept = allocate([0.1, 0.5, 0.6, 0.7], sizes, (4, 8))
    assert mean_kept(kept, sizes) <= 4
    assert allocate([0.1, 0.5], [1, 1], (4, 8)) == [5, 3]


@pytest.mark.parametrize("count", range(1, 12))
def test_the_budget_holds_for_every_number_of_blocks(count):
    kept = allocate([i + 1.0 for i in range(count)], [7] * count, (5, 8))
    assert mean_kept(kept, [7] * count) <= 5
    assert all(4 <= k <= 6 for k in kept)


def test_n_stays_within_one_and_m():
    assert min(allocate([0.1, 0.2, 0.3], [1] * 3, (1, 4))) == 1
    assert max(allocate([0.1, 0.2, 0.3], [1] * 3, (8, 8))) == 8


def test_a_block_that_turns_its_input_around_is_the_most_important():
    assert allocate([0.5, -0.2, 0.9], [1] * 3, (6, 8))[1] == 7


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_nothing_is_pruned_where_all_is_kept(allocation):
    rule = {"allocation": allocation, "norms": [1.0, 3.0, 2.0]}
    assert allocate([0.3, 0.9, 0.5], [10, 20, 10], (8, 8), **rule) == [8, 8, 8]


def test_uniform_and_unknown():
    assert allocate([0.1, 0.2], [1, 1], (6, 8), allocation="uniform") == [6, 6]
    with pytest.raises(RecipeError, match="uniform"):
        allocate([0.1], [1], (6, 8), allocation="unifrom")


def test_relative_importance_is_eq_of_section_3_3_scaled_to_the_budget():
    norms, R = [5.0, 3.0, 1.0, 1.0], 4 / 8
    printed = [8 * (a / 10 + (1 - a / 10) * R) for a in norms]
    assert sum(printed) / 4 > 4  # as printed it overshoots
    scaled = [4 * x / (sum(printed) / 4) for x in printed]
    assert scaled == pytest.approx([4.8, 4.16, 3.52, 3.52])
    # of 16, rounding down gives 14; the two that lost most get one more
    kept = allocate([], [1] * 4, (4, 8), allocation="relative_importance", norms=norms)
    assert kept == [5, 4, 4, 3]


def test_equal_norms_are_uniform():
    kept = allocate([], [3] * 30, (5, 8), allocation="relative_importance", norms=[2.0] * 30)
    assert kept == [5] * 30
    assert allocate([], [3], (5, 8), allocation="relative_importance", norms=[0.0]) == [5]


def test_sin_falls_over_the_depth_and_holds_the_budget():
    kept = allocate([], [1] * 30, (4, 8), allocation="sin")
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (5, 3)
    assert kept.count(4) == 10 and mean_kept(kept, [1] * 30) == 4
    wide = allocate([], [1] * 9, (4, 8), allocation="sin", n_high=3, n_low=3)
    assert (wide[0], wide[4], wide[-1]) == (7, 4, 1)
    assert allocate([], [1], (4, 8), allocation="sin") == [4]


@pytest.mark.parametrize("allocation", ["relative_importance", "sin"])
@given(data=st.data())
def test_every_allocation_stays_within_one_and_m_and_the_budget(allocation, data):
    m = data.draw(st.integers(1, 16))
    n = data.draw(st.integers(1, m))
    count = data.draw(st.integers(1, 12))
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    norms = data.draw(st.lists(st.floats(0, 1e3), min_size=count, max_size=count))
    kept = allocate([], sizes, (n, m), allocation=allocation, norms=norms, n_high=2, n_low=3)
    assert all(1 <= k <= m for k in kept)
    assert mean_kept(kept, sizes) <= n


def test_savings_are_those_of_the_lower_hull():
    assert _savings([10, 9.9, 9.8, 9.7, 0]) == [2.5] * 4
    assert _savings([9, 5, 3, 2]) == [4, 2, 1]  # convex already
    assert _savings([1, 2, 0]) == [0.5, 0.5]
    assert _savings([3]) == []


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_savings_lead_along_a_convex_curve_below_the_losses(losses):
    savings = _savings(losses)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(savings)) and min(savings) >= 0
    curve = [losses[0] - sum(savings[:k]) for k in range(len(losses))]
    assert all(c <= loss + 1e-9 for c, loss in zip(curve, losses, strict=True))
    assert curve[-1] == pytest.approx(min(losses), abs=1e-9)


def test_a_jump_that_pays_late_is_made_whole():
    losses = [0.9, 0.5, 0.48, 0.46, 0.44, 0.05, 0.02, 0.01]
    kept = allocate_measured([1] * 4, losses, [1] * 4, (4, 8), n_high=2, n_low=2)
    assert kept == [6, 6, 2, 2]


@given(data=st.data())
def test_measured_allocation_uses_its_budget(data):
    m = data.draw(st.integers(1, 8))
    n = data.draw(st.integers(1, m))
    count = data.draw(st.integers(1, 8))
    losses = data.draw(st.lists(st.floats(0, 1), min_size=m, max_size=m))
    damages = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    kept = allocate_measured(damages, losses, [3] * count, (n, m), n_high=2, n_low=2)
    high = min(n + 2, m)
    assert all(max(n - 2, 1) <= k <= high for k in kept)
    assert sum(kept) == n * count  # of equal sizes nothing is left
