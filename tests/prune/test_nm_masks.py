import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largest import Largest
from subbit.prune import keep_mask, masks, ranks_in_groups


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 16), st.integers(0, 9), st.data())
def test_exactly_n_of_m_are_kept_and_they_are_the_best(rows, cols, m, seed, data):
    n = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, cols), generator=generator).float()  # many ties
    keep = keep_mask(scores, (n, m))
    for start in range(0, cols, m):
        group, kept = scores[:, start : start + m], keep[:, start : start + m]
        assert (kept.sum(1) == min(n, group.shape[1])).all()
        for g, k in zip(group, kept):
            if k.any() and (~k).any():
                assert g[k].min() >= g[~k].max()


def test_submasks_lose_one_per_group_and_step_lowest_first():
    scores = torch.tensor([[3.0, 1, 2, 0, 7, 5, 6, 4]])
    ranks = ranks_in_groups(scores, 8)
    assert ranks.tolist() == [[3, 1, 2, 0, 7, 5, 6, 4]]
    for k in range(8):
        assert int((ranks >= k).sum()) == 8 - k


def test_equal_scores_lose_the_left_one_first():
    assert ranks_in_groups(torch.zeros(1, 4), 4).tolist() == [[0, 1, 2, 3]]


def test_the_last_group_is_padded_with_zeros():
    keep = keep_mask(torch.tensor([[5.0, 4, 3, 2, 1, 9, 8, 7, 1, 2, 3]]), (2, 8))
    assert keep.tolist() == [[False] * 5 + [True, True, False, False, True, True]]


def test_many_rows_are_compared_in_parts(monkeypatch):
    scores = torch.randint(0, 9, (600, 1020), generator=torch.Generator().manual_seed(0)).float()
    whole = ranks_in_groups(scores, 8)
    monkeypatch.setattr(masks, "_AT_ONCE", 1 << 20)
    with Largest() as largest:
        parts = ranks_in_groups(scores, 8)
    assert torch.equal(parts, whole)
    assert largest.nbytes <= 1 << 20  # of bool; a comparison each of all would be five times that
