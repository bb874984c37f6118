"""Levels on the int8 grid: rounding, storage, bytes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_examples import make_int8
from packed_examples import NM, TABLES, make_linear

from largest import Largest
from subbit import codes
from subbit.codes import CompressedLinear, LevelTable, on_int8_grid, row_scale
from subbit.errors import FormatError
from subbit.packed import FORMAT_VERSION, Layout, bit_report, pack, unpack
from subbit.packed.kernels.layout import expand


def test_rounding_is_to_the_nearest_step_of_the_largest_level():
    levels = LevelTable("free", 3, torch.tensor([[[1.0, -0.5, 0.25]]]).half())
    salient = LevelTable("free", 2, torch.tensor([[[-2.0, 0.0]]]).half())
    own, extra = on_int8_grid(levels, salient)
    scale = torch.tensor([[2 / 127]]).bfloat16()
    assert torch.equal(own.scale, scale) and torch.equal(extra.scale, scale)
    assert own.params.tolist() == [[[64, -32, 16]]]
    assert extra.params.tolist() == [[[-127, 0]]]
    error = (own.values() - levels.values()).abs().max()
    assert error <= 0.51 * scale.float().item()


def test_it_is_deterministic_and_done_once():
    linear = make_int8(9, 200, seed=1)
    again = on_int8_grid(linear.levels, linear.salient_levels)
    assert again[0] is linear.levels and again[1] is linear.salient_levels


def test_rows_of_zeros_stay_zero():
    levels = LevelTable("pairs", 3, torch.zeros(2, 1, 6).half())
    own, none = on_int8_grid(levels, None)
    assert none is None
    assert (own.values() == 0).all() and (own.scale == 0).all()


@pytest.mark.parametrize("size", [6e-8, 65504.0])
def test_smallest_and_largest_float16_levels(size):
    own, _ = on_int8_grid(LevelTable("free", 1, torch.full((1, 1, 1), size).half()), None)
    assert own.values().item() == pytest.approx(size, rel=0.01)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 300),
    nm=st.sampled_from(NM),
    levels=st.sampled_from(TABLES),
    salient=st.sampled_from([None, *TABLES]),
    group_size=st.sampled_from([32, 128, 1000]),
    zeros=st.booleans(),
    by_row=st.booleans(),
)
def test_pack_and_unpack(rows, cols, nm, levels, salient, group_size, zeros, by_row):
    structure = dict(nm=nm, levels=levels, salient=salient, group_size=group_size, zeros=zeros)
    linear = make_int8(rows, cols, by_row, **structure)
    layout, tensors = pack(linear)
    assert layout.int8 and layout.row_scale == (by_row and cols > group_size)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layout.fields()
    back = unpack(layout, tensors)
    assert torch.equal(back.codes, linear.codes)
    assert torch.equal(back.levels.params, linear.levels.params)
    assert torch.equal(back.levels.scale, linear.levels.scale)
    assert torch.equal(back.dequantize(), linear.dequantize())


def test_one_scale_for_a_row():
    levels = LevelTable("free", 2, torch.tensor([[[1.0, -0.5], [0.25, 3.0]]]).half())
    scale = row_scale(torch.tensor([[1.0, -2.0, 0.5]]))
    assert torch.equal(scale, torch.tensor([[2 / 127]]).bfloat16())
    own, _ = on_int8_grid(levels, None, scale)
    assert own.params.tolist() == [[[64, -32], [16, 127]]]  # 3.0 is cut
    linear = CompressedLinear(torch.ones(1, 256, dtype=torch.uint8), own, 128)
    layout, tensors = pack(linear)
    assert layout.row_scale and tuple(tensors["scale"].shape) == (1, 1)
    assert layout.fields()["scale"].nbytes == 2
    assert torch.equal(unpack(layout, tensors).dequantize(), linear.dequantize())
    assert linear.dequantize()[0, 128] == 16 * scale.item()


def test_row_scale_goes_with_int8_and_several_groups():
    data = pack(make_int8(8, 256, by_row=True))[0].to_dict()
    assert data["row_scale"] is True
    for wrong in ({"int8": False}, {"group_size": 256}, {"row_scale": 1}):
        with pytest.raises(FormatError, match="row_scale"):
            Layout.from_dict(data | wrong)


def test_json_names_int8_only_where_it_is():
    layout = pack(make_int8(8, 128))[0]
    assert layout.to_dict()["int8"] is True
    assert Layout.from_dict(layout.to_dict()) == layout
    ordinary = replace(layout, int8=False)
    assert "int8" not in ordinary.to_dict()
    assert Layout.from_dict(ordinary.to_dict()) == ordinary
    with pytest.raises(FormatError, match="int8"):
        Layout.from_dict(layout.to_dict() | {"int8": 1})


def test_layouts_that_int8_does_not_go_with():
    data = pack(make_int8(8, 128))[0].to_dict()
    for wrong in (
        {"column_scale": True, "scaled_params": 2},
        {"salient_elements": 5, "salient_group_size": 64},
    ):
        with pytest.raises(FormatError, match="int8"):
            Layout.from_dict(data | wrong)


def test_twelve_bytes_a_record():
    layout = pack(make_int8(64, 1024))[0]
    fields = layout.fields()
    records = sum(fields[name].nbytes for name in ("levels", "salient_levels", "scale"))
    assert records == 64 * 8 * 12
    assert bit_report(layout).floor["scales"] == 96 / 128


def test_tables_must_share_their_scale():
    linear = make_int8(8, 128)
    other = replace(linear.salient_levels, scale=linear.levels.scale * 2)
    with pytest.raises(ValueError, match="same int8 scale"):
        pack(replace(linear, salient_levels=other))
    with pytest.raises(ValueError, match="same int8 scale"):
        pack(replace(linear, salient_levels=replace(other, scale=None)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(bad):
    linear = make_int8(8, 128)
    layout, tensors = pack(linear)
    scale = tensors["scale"].clone()
    scale[3, 0] = bad
    with pytest.raises(FormatError, match="'scale'"):
        unpack(layout, tensors | {"scale": scale})
    linear.levels.scale[3, 0] = bad
    linear.salient_levels.scale[3, 0] = bad
    with pytest.raises((FormatError, ValueError), match="scale"):
        pack(linear)


@pytest.mark.parametrize("name", ["levels", "salient_levels"])
def test_the_level_that_has_no_opposite_is_refused(name):
    """Two products with -128 do not fit the sums of a kernel."""
    linear = make_int8(9, 200)
    layout, tensors = pack(linear)
    tensors[name][3, 1, 0] = -128
    with pytest.raises(FormatError, match=f"'{name}' holds the level -128"):
        unpack(layout, tensors)
    with pytest.raises(FormatError, match="-128"):
        expand(layout, tensors)
    getattr(linear, name).params[3, 1, 0] = -128
    with pytest.raises(FormatError, match=f"{name}: row 3, column group 1 .* -128"):
        pack(linear)


def test_golden_bytes_of_int8_levels():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    assert FORMAT_VERSION == 2
    scale = torch.tensor([[0.5], [-2.0]]).bfloat16()
    linear = CompressedLinear(
        codes=torch.tensor([[1, 0, 2, 3], [0, 6, 1, 2]], dtype=torch.uint8),
        levels=LevelTable("free", 6, torch.tensor([[[1, -1, 2, -2, 127, -127]]] * 2).char(), scale),
        group_size=128,
        nm=(3, 4),
        salient=torch.tensor([0, 0, 0, 1], dtype=torch.bool),
        salient_levels=LevelTable("free", 4, torch.tensor([[[5, 6, 7, 8]]] * 2).char(), scale),
    )
    _, tensors = pack(linear)
    found = {name: bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}
    assert found == {
        # the 3:4 patterns, column 0 lowest, 0111 1011 1101 1110 are numbers 0..3: 1101, 1110
        "mask": bytes([2, 3]),
        # level indices of kept weights in base 6, three a byte: 0 1 2; 5 0 1
        "digit0": bytes([0 + 6 * 1 + 36 * 2, 5 + 6 * 0 + 36 * 1]),
        "levels": bytes([1, 255, 2, 254, 127, 129] * 2),
        "scale": bytes([0x00, 0x3F, 0x00, 0xC0]),
        "salient": bytes([0b1000]),
        "salient_levels": bytes([5, 6, 7, 8] * 2),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"elements": True, "nm": None, "salient_group_size": 32},
        {"column_scale": True},
        {"scaled_params": 4},
        {"salient": None},
        {"int8": True},
        {"int8": True, "by_row": True},
    ],
)
def test_many_rows_are_looked_up_in_parts(options, monkeypatch):
    options = dict(options)
    make = make_int8 if options.pop("int8", False) else make_linear
    linear = make(70, 300, **options)
    whole = linear.dequantize()
    monkeypatch.setattr(codes, "_AT_ONCE", 4000)
    with Largest() as largest:
        assert torch.equal(linear.dequantize(), whole)
    assert largest.nbytes <= 4 * whole.numel()  # the result; 64-bit indices of all take twice that
