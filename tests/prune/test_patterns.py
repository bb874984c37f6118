"""What each type of pruning keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subbit.errors import RecipeError
from subbit.prune import kept_count, pruning_ranks, ranks_in_groups, select, structure

SCORES = torch.tensor([[1.0, 9, 2, 8, 3, 7, 4, 6], [0, 0, 0, 1, 0, 9, 9, 9]])


def test_semi_structured_is_the_nm_mask():
    mask = select(SCORES, (2, 4))
    assert mask.int().tolist() == [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]]


def test_unstructured_by_row_and_of_the_whole_matrix():
    by_row = select(SCORES, (2, 4), "unstructured")
    assert by_row.int().tolist() == [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1, 1, 1]]
    whole = select(SCORES, (2, 4), "unstructured", by_row=False)
    assert whole.int().tolist() == [[0, 1, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]


def test_structured_keeps_the_columns_of_the_highest_sums():
    mask = select(SCORES, (1, 2), "structured")
    assert mask.int().tolist() == [[0, 0, 0, 1, 0, 1, 1, 1]] * 2


def test_of_equal_scores_the_left_goes_first():
    mask = select(torch.ones(2, 6), (1, 3), "unstructured")
    assert mask.int().tolist() == [[0, 0, 0, 0, 1, 1]] * 2


@given(st.integers(1, 400), st.integers(1, 16), st.integers(0, 15))
def test_kept_count_is_the_rounded_share_and_never_nothing(count, n, extra):
    m = n + extra
    kept = kept_count(count, (n, m))
    assert 1 <= kept <= count
    assert abs(kept - count * n / m) <= 0.5 or kept == 1


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'structured'"):
        select(SCORES, (2, 4), "structurd")


@pytest.mark.parametrize("pruning", ["semi-structured", "unstructured", "structured"])
def test_ranks_are_nested_masks_that_end_where_select_does(pruning):
    scores = torch.rand(5, 19, generator=torch.Generator().manual_seed(0))
    ranks = pruning_ranks(scores, (3, 8), pruning)
    assert ranks.dtype == torch.uint8 and int(ranks.max()) <= 7
    for step in range(8):
        kept = select(scores, (8 - step, 8), pruning, by_row=False)
        assert torch.equal(ranks >= step, kept), step


@pytest.mark.parametrize("pruning", ["unstructured", "structured"])
def test_all_ranks_take_one_sort(pruning, monkeypatch):
    sorts, plain = [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *a, **k: sorts.append(0) or plain(*a, **k))
    pruning_ranks(SCORES, (2, 8), pruning)
    assert len(sorts) == 1


def test_ranks_by_row():
    by_row = pruning_ranks(SCORES, (2, 4), "unstructured", by_row=True)
    assert ((by_row >= 2).sum(1) == 4).all()
    whole = pruning_ranks(SCORES, (2, 4), "unstructured")
    assert (whole >= 2).sum(1).tolist() == [5, 3]


def test_ranks_of_semi_structured_pruning_are_those_in_groups():
    assert torch.equal(pruning_ranks(SCORES, (2, 4)), ranks_in_groups(SCORES, 4))


def test_what_a_mask_may_be_relied_on_for():
    assert structure((4, 8), "semi-structured") == ((4, 8), False)
    assert structure((4, 8), "unstructured") == (None, False)
    assert structure((4, 8), "structured") == (None, True)
    assert structure(None, "semi-structured") == (None, False)
