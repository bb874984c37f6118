from dataclasses import replace
from math import log2

import pytest
from packed_examples import make_linear

from subbit.packed import Layout, SparseLayout, bit_report, model_bits, pack

PAPER = Layout(4096, 4096, 128, (4, 8), False, ("pairs", 3), ("residual", 1))


def test_stored_bits_of_the_paper_structure_by_hand():
    report = bit_report(PAPER, 410)
    weights = 4096 * 4096
    assert report.field_bytes == {
        "mask": weights * 7 // 8 // 8,
        "sign": weights // 2 // 8,
        "digit1": 4096 * 410,  # 2048 trits a row: 409.6 bytes, padded to 410
        "levels": 4096 * 32 * 6 * 2,
        "salient": 512,
        "salient_levels": 4096 * 32 * 3 * 2,
    }
    assert report.stored_bits == pytest.approx(
        0.875 + 0.5 + 410 * 8 / 4096 + 1.125 + 1 / 4096, abs=1e-12
    )
    assert report.stored_bits == PAPER.bits_per_weight
    assert report.stored_bits == pytest.approx(3.3, abs=2e-3)


def test_paper_bits():
    share = 410 / 4096
    assert bit_report(PAPER, 410).paper_bits == pytest.approx((2 * share + 1 - share) / 2)
    assert bit_report(PAPER).paper_bits == 0.5
    plain = Layout(64, 64, 64, None, False, ("free", 4), None)
    assert bit_report(plain).paper_bits == 2.0
    ternary = replace(plain, levels=("free", 2), zeros=True)
    assert bit_report(ternary).paper_bits == pytest.approx(log2(3))


def test_paper_bits_where_single_weights_or_whole_columns_are_pruned():
    free = Layout(64, 128, 128, None, True, ("pairs", 3), ("residual", 1))
    share = 16 / 128
    assert bit_report(free, 16, 0.5).paper_bits == pytest.approx((1 + share) / 2)
    assert bit_report(free, 16).paper_bits == pytest.approx(1 + share)
    columns = replace(free, zeros=False, kept_columns=64)
    assert bit_report(columns, 16).paper_bits == pytest.approx((64 + 16) / 128)  # all 16 are kept
    assert bit_report(columns, 16).salient_share == share
    assert bit_report(columns, 16).floor["second_sign"] == pytest.approx(16 / 128)
    assert bit_report(columns, 16, 0.1).paper_bits == bit_report(columns, 16).paper_bits


def test_floor_of_the_paper_structure():
    share = 1024 / 4096
    floor = bit_report(PAPER, 1024).floor
    assert floor["mask"] == pytest.approx(log2(70) / 8)
    assert floor["sign"] == pytest.approx(0.5)
    assert floor["label"] == pytest.approx(log2(3) * 0.5 * (1 - share))
    assert floor["second_sign"] == pytest.approx(0.5 * share)
    assert floor["scales"] == 1.125
    assert 0 < floor["bitmap"] < 1 / 4096
    report = bit_report(PAPER, 1024)
    assert report.floor_bits == pytest.approx(sum(floor.values()))
    assert report.floor_bits < report.stored_bits


def test_floor_counts_the_short_group_exactly():
    layout = Layout(8, 10, 128, (4, 8), False, ("pairs", 3), None)
    floor = bit_report(layout).floor
    assert floor["mask"] == pytest.approx(log2(70) / 10)  # both of the last two are kept
    assert floor["sign"] == pytest.approx(6 / 10)


def test_salient_columns_must_be_possible():
    with pytest.raises(ValueError, match="4097"):
        bit_report(PAPER, 4097)
    with pytest.raises(ValueError, match="salient_columns"):
        bit_report(replace(PAPER, salient=None), 1)


def test_report_equals_the_bytes_of_the_tensors():
    layout, tensors = pack(make_linear(7, 133))
    assert bit_report(layout).field_bytes == {name: t.nbytes for name, t in tensors.items()}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_grids_take_their_bits_and_a_scale_and_a_zero(bits):
    report = bit_report(Layout(64, 1024, 128, None, False, ("grid", 2**bits), None))
    assert report.paper_bits == bits
    assert report.stored_bits == bits + (16 + bits) / 128 == report.floor_bits


def test_single_salient_weights_count_eight_bits_as_in_pb_llm():
    share = 0.125
    layout = Layout(
        64, 1000, 128, None, False, ("symmetric", 1), ("grid", 255), 8000, salient_group_size=1000
    )
    report = bit_report(layout)
    assert report.salient_share == share
    assert report.paper_bits == pytest.approx(8 * share + 1 - share)
    assert report.stored_bits == pytest.approx(1.6 + 8 * share + (8 * 16 + 16 + 8) / 1000)
    assert report.floor["values"] == pytest.approx(share * log2(255))
    assert report.floor["sign"] == pytest.approx(1 - share)
    assert 0.5 < report.floor["bitmap"] < 0.55
    assert report.floor_bits < report.stored_bits
    with pytest.raises(ValueError, match="salient_columns"):
        bit_report(layout, 3)


@pytest.mark.parametrize(
    ("kwargs", "paper", "stored"),
    [
        ({"nm": (4, 8)}, 8, 8 + 7 / 8),
        ({"nm": (8, 8)}, 16, 16),
        ({"kept_columns": 32}, 8, 8 + 1 / 64),
        ({"elements": 1024}, 4, 4 + 1),
    ],
)
def test_pruning_alone_leaves_16_bits_a_weight(kwargs, paper, stored):
    report = bit_report(SparseLayout(64, 64, "bfloat16", **kwargs))
    assert report.paper_bits == paper
    assert report.stored_bits == stored >= report.floor_bits >= paper
    assert report.salient_share == 0
    with pytest.raises(ValueError, match="salient_columns"):
        bit_report(SparseLayout(64, 64, "bfloat16", **kwargs), 1)


def test_model_bits_are_averages_over_weights_and_the_whole_file():
    small = replace(PAPER, rows=64, cols=128, nm=(2, 8))
    reports = [bit_report(PAPER), bit_report(small)]
    total = model_bits(reports, other_bytes=1000, other_params=500)
    weights = 4096 * 4096 + 64 * 128
    assert total.weights == weights
    assert total.linear_bytes == PAPER.nbytes + small.nbytes
    assert total.stored_bits == 8 * (PAPER.nbytes + small.nbytes) / weights
    assert total.paper_bits == pytest.approx((0.5 * 4096 * 4096 + 0.25 * 64 * 128) / weights)
    assert total.file_bits == 8 * (total.linear_bytes + 1000) / (weights + 500)
    assert model_bits(reports).file_bits == total.stored_bits
    with pytest.raises(ValueError, match="no linears"):
        model_bits([])
