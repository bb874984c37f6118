import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subbit.packed.codecs import (
    digit_row_bytes,
    pack_bits,
    pack_digits,
    select_rows,
    unpack_bits,
    unpack_digits,
)


def _random(rows: int, count: int, below: int, seed: int) -> torch.Tensor:
    return torch.randint(below, (rows, count), generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_bits_round_trip(width, rows, count, seed):
    values = _random(rows, count, 1 << width, seed)
    data = pack_bits(values, width)
    assert data.dtype == torch.uint8
    assert data.shape == (rows, -(-count * width // 8))
    assert torch.equal(unpack_bits(data, width, count).long(), values)


@given(st.integers(1, 16), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bit_stream_is_little_endian(width, count, seed):
    values = _random(1, count, 1 << width, seed)[0].tolist()
    number = sum(value << (i * width) for i, value in enumerate(values))
    data = pack_bits(torch.tensor([values]), width)
    assert bytes(data[0].tolist()) == number.to_bytes(-(-count * width // 8), "little")


@pytest.mark.parametrize("radix", range(2, 257))
def test_digits_round_trip_and_size(radix):
    for count in (1, 2, 3, 5, 11, 13, 64, 67):
        digits = _random(3, count, radix, radix).to(torch.uint8)
        digits[0] = radix - 1
        data = pack_digits(digits, radix)
        assert data.shape == (3, digit_row_bytes(count, radix))
        found, good = unpack_digits(data, radix, count)
        assert good
        assert torch.equal(found, digits)


def test_trits_are_five_a_byte():
    data = pack_digits(torch.tensor([[0, 1, 2, 2, 1, 2, 0]], dtype=torch.uint8), 3)
    assert data.tolist() == [[3 + 18 + 54 + 81, 2]]


def test_sextets_are_twelve_a_word_and_the_tail_is_short():
    digits = torch.full((1, 15), 5, dtype=torch.uint8)
    data = pack_digits(digits, 6)
    assert bytes(data[0].tolist()) == (6**12 - 1).to_bytes(4, "little") + bytes([6**3 - 1])


def test_impossible_words_are_reported_and_still_give_digits():
    digits, good = unpack_digits(torch.full((2, 3), 243, dtype=torch.uint8), 3, 13)
    assert not good
    assert digits.max() < 3
    digits, good = unpack_digits(torch.full((2, 8), 255, dtype=torch.uint8), 6, 24)
    assert not good
    assert digits.max() < 6


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 11, 16])
def test_select_rows_is_indexing(width):
    table = _random(30, width, 256, width).to(torch.uint8)
    index = _random(4, 9, 30, 1)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(select_rows(table, index.to(dtype)), table[index])
