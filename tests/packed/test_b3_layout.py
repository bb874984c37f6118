"""The resident layout: every byte where layout.py says, and the way back without loss."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_examples import b2_linears, make_int8, resident_linears
from packed_examples import make_linear

from subbit.codes import SparseLinear
from subbit.errors import FormatError
from subbit.packed import pack, unpack
from subbit.packed.kernels import fits
from subbit.packed.kernels.layout import code_bits, collapse, dense_rows, expand, sizes


@settings(max_examples=60, deadline=None)
@given(linear=resident_linears())
def test_disk_to_resident_and_back(linear):
    layout, tensors = pack(linear)
    assert fits(layout)
    tiles, flags = expand(layout, tensors)
    assert (tiles.numel(), flags.numel()) == sizes(layout.rows, layout.cols, code_bits(layout))
    back = collapse(layout, tiles, flags)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    dense = dense_rows(tiles, flags, *linear.shape, 0, layout.rows, torch.float32)
    assert torch.equal(dense, linear.dequantize())


def test_many_rows_are_worked_on_in_chunks():
    linear = make_int8(5000, 300, seed=1)
    layout, tensors = pack(linear)
    tiles, flags = expand(layout, tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in collapse(layout, tiles, flags).items())
    part = dense_rows(tiles, flags, 5000, 300, 4096, 5000, torch.bfloat16)
    assert torch.equal(part, linear.dequantize()[4096:].bfloat16())


def test_a_chunk_without_a_pruned_weight_is_packed_as_the_others_are():
    linear = make_int8(8208, 128, nm=None, levels=("free", 6), salient=None)
    linear.codes[0, 5] = 0  # the only one; there are two chunks
    layout, tensors = pack(linear)
    back = collapse(layout, *expand(layout, tensors))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def weight_from_bytes(tiles, flags, cols, row, col):
    """One weight of B3, read bit by bit as the layout is described."""
    full = cols // 128 + (cols % 128 > 64)
    stride = full * 960 + 704 * (0 < cols % 128 <= 64)
    block, k, j = col // 128, col % 128 // 16, col % 16
    count = 3 if block < full else 2
    unit = row // 16 * stride + block * 960
    tile, r = row % 16 // 4, row % 4

    def plane(p):
        return int(tiles[unit + (tile * count + p) * 64 + 16 * r + j])

    if k < 6:
        code = plane((0, 1, 2)[k // 2]) >> 3 * (k % 2) & 7
    else:
        code = plane(k - 6) >> 6 | (plane(2) >> k & 1) << 2
    record = tiles[unit + 4 * count * 64 + 12 * (row % 16) :][:12].tolist()
    table = [128, *record[:6], 128, 128, *record[6:10], 128, 128, 128]
    if not flags[-1]:
        table = [record[7], *record[:7]]
    scale = torch.tensor(record[10:], dtype=torch.uint8).view(torch.bfloat16).item()
    return (table[code | int(flags[col])] - 128) * scale


def weight_from_b2_bytes(tiles, flags, cols, row, col):
    """One weight of B2, likewise."""
    full = cols // 128 + (cols % 128 > 64)
    stride = full * 608 + 352 * (0 < cols % 128 <= 64)
    block, k, j = col // 128, col % 128 // 16, col % 16
    count = 2 if block < full else 1
    unit = row // 16 * stride + block * 608
    byte = tiles[unit + (row % 16 // 4 * count + k // 4) * 64 + 16 * (row % 4) + j]
    record = tiles[unit + 4 * count * 64 + 6 * (row % 16) :][:6].tolist()
    scale = torch.tensor(record[4:], dtype=torch.uint8).view(torch.bfloat16).item()
    assert not flags.any()
    return ([record[3], *record[:3]][int(byte) >> 2 * (k % 4) & 3] - 128) * scale


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ({}, weight_from_bytes),
        ({"levels": ("free", 7), "salient": None}, weight_from_bytes),
        ({"levels": ("free", 8), "salient": None, "nm": None}, weight_from_bytes),
        ({"levels": ("free", 3), "salient": None}, weight_from_b2_bytes),
        ({"levels": ("free", 4), "salient": None, "nm": None}, weight_from_b2_bytes),
    ],
)
@pytest.mark.parametrize("shape", [(16, 128), (19, 200), (5, 330)])
def test_bytes_mean_what_the_description_says(shape, kind, read):
    linear = make_int8(*shape, seed=3, **kind)
    tiles, flags = expand(*pack(linear))
    dense = linear.dequantize()
    rng = torch.Generator().manual_seed(0)
    for _ in range(300):
        row, col = (int(torch.randint(side, (1,), generator=rng)) for side in shape)
        assert read(tiles, flags, shape[1], row, col) == dense[row, col]


@settings(max_examples=40, deadline=None)
@given(linear=b2_linears())
def test_few_levels_take_two_bits_a_code(linear):
    layout, tensors = pack(linear)
    assert code_bits(layout) == 2
    assert expand(layout, tensors)[0].numel() < sizes(*linear.shape, 3)[0]


def test_golden_unit():
    """The bytes of a unit and a half one: what b3/layout.h was written for."""
    rows, cols = 16, 192
    base = make_int8(rows, cols, nm=None, seed=0)
    place = torch.arange(rows * cols).view(rows, cols)
    salient = torch.arange(cols) % 5 == 0
    codes = torch.where(salient, place % 4 + 1, place % 7)
    levels = replace(
        base.levels,
        params=(torch.arange(rows * 2 * 6).view(rows, 2, 6) % 255 - 127).to(torch.int8),
        scale=torch.linspace(0.5, 2, rows * 2).view(rows, 2).bfloat16(),
    )
    extra = replace(
        base.salient_levels,
        params=(100 - torch.arange(rows * 2 * 4).view(rows, 2, 4) % 200).to(torch.int8),
        scale=levels.scale,
    )
    linear = replace(
        base, codes=codes.byte(), levels=levels, salient_levels=extra, salient=salient, nm=None
    )
    tiles, flags = expand(*pack(linear))
    assert tiles.numel() == 960 + 704
    assert tiles[:8].tolist() == GOLDEN_START
    assert hashlib.sha256(tiles.numpy().tobytes()).hexdigest() == GOLDEN
    assert flags[:16].tolist() == [8, 0, 0, 0, 0] * 3 + [8]


GOLDEN_START = [81, 153, 34, 107, 76, 194, 14, 80]
GOLDEN = "88854d70febb7122e751911d66f3bb4340e943b9570b7618bced35e188769a9d"


def test_golden_unit_of_two_bits():
    rows, cols = 16, 192
    base = make_int8(rows, cols, levels=("free", 4), salient=None, nm=None, seed=0)
    place = torch.arange(rows * cols).view(rows, cols)
    levels = replace(
        base.levels,
        params=(torch.arange(rows * 2 * 4).view(rows, 2, 4) % 255 - 127).to(torch.int8),
        scale=torch.linspace(0.5, 2, rows * 2).view(rows, 2).bfloat16(),
    )
    linear = replace(base, codes=(place * place % 7 % 4 + 1).byte(), levels=levels)
    tiles, flags = expand(*pack(linear))
    assert tiles.numel() == 608 + 352
    assert tiles[:8].tolist() == GOLDEN_B2_START
    assert hashlib.sha256(tiles.numpy().tobytes()).hexdigest() == GOLDEN_B2
    assert not flags.any()


GOLDEN_B2_START = [181, 94, 173, 87, 235, 213, 122, 181]
GOLDEN_B2 = "3fdcd236a8d66ac99c2958cc34931fc9ab12f44d6611cb5a7c99bba3d47e568c"


@pytest.mark.parametrize(
    "linear",
    [
        make_linear(8, 128),  # float16 levels
        make_int8(8, 256, group_size=64),
        make_int8(8, 128, levels=("free", 7)),
        make_int8(8, 128, levels=("free", 8), salient=None),
        make_int8(8, 128, salient=("free", 5)),
        make_int8(8, 300, group_size=200),
    ],
    ids=[
        "fp16",
        "group of 64",
        "7 beside salient ones",
        "8 levels beside pruned weights",
        "5 salient levels",
        "group of 200",
    ],
)
def test_what_does_not_fit(linear):
    assert not fits(pack(linear)[0])


@pytest.mark.parametrize(("count", "nm"), [(7, (6, 8)), (8, None)])
def test_more_levels_fit_where_no_column_is_salient(count, nm):
    linear = make_int8(40, 300, levels=("free", count), salient=None, nm=nm)
    assert int(linear.codes.max()) == count
    layout, tensors = pack(linear)
    assert fits(layout)
    tiles, flags = expand(layout, tensors)
    assert torch.equal(dense_rows(tiles, flags, 40, 300, 0, 40, torch.float32), linear.dequantize())
    again = collapse(layout, tiles, flags)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("scaled", [True, False])
def test_other_results_do_not_fit(scaled):
    linear = make_int8(8, 128, nm=None, salient=None)
    if scaled:
        linear = replace(linear, column_scale=torch.ones(128).half())
    else:
        linear = SparseLinear(torch.ones(8, 128).half(), torch.ones(8, 128).bool())
    assert not fits(pack(linear)[0])


def test_damaged_codes_are_refused():
    layout, tensors = pack(make_int8(8, 128, nm=(6, 8)))
    tensors["mask"] = tensors["mask"] | 255
    with pytest.raises(FormatError, match="mask"):
        expand(layout, tensors)


@settings(max_examples=60, deadline=None)
@given(linear=resident_linears(), data=st.data())
def test_hostile_bytes_are_refused_or_mean_what_the_reference_says(linear, data):
    """Any bytes in any field: the resident layout never means other weights than `unpack`."""
    layout, tensors = pack(linear)
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].clone().view(torch.uint8).flatten()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, raw.numel() - 1))
        raw[place] = data.draw(st.integers(0, 255))
    tensors[name] = raw.view(tensors[name].dtype).view(tensors[name].shape)
    try:
        wanted = unpack(layout, tensors).dequantize()
    except FormatError:
        with pytest.raises(FormatError):
            expand(layout, tensors)
        return
    tiles, flags = expand(layout, tensors)
    assert (tiles.numel(), flags.numel()) == sizes(layout.rows, layout.cols, code_bits(layout))
    assert set(flags[:-1].tolist()) <= {0, 8} and flags[-1] in (0, 1)
    rows, cols = linear.shape
    assert torch.equal(dense_rows(tiles, flags, rows, cols, 0, rows, torch.float32), wanted)


@pytest.mark.parametrize("name", ["levels", "salient_levels", "scale", "salient", "mask"])
def test_fields_of_other_shapes_or_types_are_refused(name):
    layout, tensors = pack(make_int8(20, 200))
    for spoiled in (
        tensors[name][..., :-1],
        torch.cat((tensors[name], tensors[name])),
        tensors[name].double(),
    ):
        with pytest.raises(FormatError, match=name):
            expand(layout, {**tensors, name: spoiled})
    if name != "levels":
        with pytest.raises(FormatError, match=name):
            expand(layout, {key: t for key, t in tensors.items() if key != name})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(value):
    layout, tensors = pack(make_int8(20, 200))
    tensors["scale"][3, 1] = value
    with pytest.raises(FormatError, match="scale"):
        expand(layout, tensors)
