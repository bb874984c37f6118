import pytest

from subbit.errors import RecipeError
from subbit.prune.allocate import allocate, mean_kept


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


def test_uniform_and_unknown():
    assert allocate([0.1, 0.2], [1, 1], (6, 8), allocation="uniform") == [6, 6]
    with pytest.raises(RecipeError, match="uniform"):
        allocate([0.1], [1], (6, 8), allocation="unifrom")
