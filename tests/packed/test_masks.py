from itertools import combinations
from math import comb

import pytest
import torch

from subbit.packed.masks import (
    index_to_mask,
    mask_index_bits,
    mask_to_index,
    patterns,
    tail_columns,
)


def test_patterns_in_increasing_order_column_0_lowest():
    assert patterns(2, 4).int().tolist() == [
        [1, 1, 0, 0],  # 3
        [1, 0, 1, 0],  # 5
        [0, 1, 1, 0],  # 6
        [1, 0, 0, 1],  # 9
        [0, 1, 0, 1],  # 10
        [0, 0, 1, 1],  # 12
    ]


def test_patterns_are_nobodys_to_change_and_on_any_device():
    patterns(2, 4).zero_()
    assert patterns(2, 4).sum() == 12
    assert patterns(2, 4, torch.device("meta")).is_meta


@pytest.mark.parametrize("m", range(1, 17))
def test_every_mask_of_every_nm_round_trips(m):
    for n in range(1, m + 1):
        expected = sorted(sum(1 << i for i in kept) for kept in combinations(range(m), n))
        numbers = torch.tensor(expected)
        mask = (numbers[:, None] >> torch.arange(m) & 1).bool()
        index = mask_to_index(mask, n)
        assert index.tolist() == list(range(comb(m, n)))
        assert torch.equal(index_to_mask(index, n, m), mask)


def test_mask_index_bits():
    bits = {n: mask_index_bits(n, 8) for n in range(1, 9)}
    assert bits == {1: 3, 2: 5, 3: 6, 4: 7, 5: 6, 6: 5, 7: 3, 8: 0}
    assert mask_index_bits(2, 4) == 3
    assert mask_index_bits(8, 16) == 14


def test_tail_columns():
    assert tail_columns(16, 4, 8) == (0, 0)
    assert tail_columns(18, 4, 8) == (6, 2)
    assert tail_columns(21, 4, 8) == (3, 0)
