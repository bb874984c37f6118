from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_examples import NM, TABLES, linears, make_linear, make_sparse

from subbit.codes import Compressed, CompressedLinear, LevelTable, SparseLinear
from subbit.errors import FormatError
from subbit.packed import FORMAT_VERSION, AnyLayout, pack, read_layout, unpack
from subbit.packed.pack import slice_rows

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def assert_same(found: Compressed, expected: Compressed) -> None:
    assert type(found) is type(expected)
    assert (found.nm, found.structured) == (expected.nm, expected.structured)
    assert torch.equal(found.kept, expected.kept)
    if isinstance(found, SparseLinear):
        assert found.values.dtype == expected.values.dtype
        assert torch.equal(found.values, expected.values)
        return
    assert torch.equal(found.codes, expected.codes)
    assert found.group_size == expected.group_size
    assert found.salient_group_size == expected.salient_group_size
    assert (found.column_scale is None) == (expected.column_scale is None)
    if found.column_scale is not None:
        assert torch.equal(found.column_scale, expected.column_scale)
    for name in ("levels", "salient_levels"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (mine.kind, mine.groups) == (other.kind, other.groups)
            assert torch.equal(mine.params, other.params)
    assert (found.salient is None) == (expected.salient is None)
    if found.salient is not None:
        assert torch.equal(found.salient, expected.salient)


def assert_round_trip(linear: Compressed) -> None:
    layout, tensors = pack(linear)
    table = layout.fields()
    assert list(tensors) == list(table)
    for name, tensor in tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == table[name]
    assert layout.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    found = unpack(read_layout(layout.to_dict()), tensors)
    assert_same(found, linear)
    assert torch.equal(found.dequantize(), linear.dequantize())


@given(linears())
@settings(max_examples=200, **SLOW)
def test_round_trip(linear):
    assert_round_trip(linear)


@pytest.mark.parametrize("salient", [None, *TABLES])
@pytest.mark.parametrize("levels", TABLES)
def test_round_trip_of_every_pair_of_tables(levels, salient):
    assert_round_trip(make_linear(3, 53, (4, 8), levels, salient, 32))
    assert_round_trip(make_linear(3, 53, None, levels, salient, 32))
    assert_round_trip(make_linear(3, 53, None, levels, salient, 32, zeros=True))


@pytest.mark.parametrize("nm", NM)
def test_round_trip_of_every_tail(nm):
    for cols in range(1, 34):
        assert_round_trip(make_linear(2, cols, nm, group_size=32, seed=cols))


def test_round_trip_over_several_row_chunks():
    linear = make_linear(1030, 2050)
    assert_round_trip(linear)
    layout, tensors = pack(linear)
    part = unpack(*slice_rows(layout, tensors, 500, 600))
    assert torch.equal(part.codes, linear.codes[500:600])


def test_golden_bytes():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    assert FORMAT_VERSION == 2
    codes = torch.tensor([[1, 0, 4, 6, 3, 2], [0, 5, 2, 1, 6, 6]], dtype=torch.uint8)
    linear = CompressedLinear(
        codes=codes,
        levels=LevelTable("pairs", 3, torch.full((2, 2, 6), 1.5, dtype=torch.float16)),
        group_size=4,
        nm=(3, 4),
        salient=torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool),
        salient_levels=LevelTable("residual", 1, torch.full((2, 2, 3), -2.0).half()),
    )
    _, tensors = pack(linear)
    found = {name: bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}
    assert found == {
        # the 3:4 patterns 0111 1011 1101 1110 are numbers 0..3, two bits each; columns 4, 5 and
        # the virtual column 6 are pattern 0
        "mask": bytes([0b0010, 0b0011]),
        # level indices of kept weights: 0 3 5 2 1 and virtual 0; 4 1 0 5 5 and virtual 0
        "sign": bytes([0b010110, 0b011010]),
        # index // 2 in trits: 0 1 2 1 0 | 0; 2 0 0 2 2 | 0
        "digit1": bytes([0 + 3 + 18 + 27 + 0, 0, 2 + 0 + 0 + 54 + 162, 0]),
        "levels": bytes([0x00, 0x3E] * 24),
        "salient": bytes([0b000100]),
        "salient_levels": bytes([0x00, 0xC0] * 12),
    }


def test_golden_bytes_without_nm():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    assert FORMAT_VERSION == 2
    six = LevelTable("free", 6, torch.zeros(1, 1, 6, dtype=torch.float16))
    codes = torch.tensor([[6] * 12 + [3]], dtype=torch.uint8)
    _, tensors = pack(CompressedLinear(codes, six, 128))
    assert bytes(tensors["digit0"][0].tolist()) == bytes([0xFF, 0x0F, 0xBF, 0x81, 0x02])
    two = LevelTable("free", 2, torch.zeros(1, 1, 2, dtype=torch.float16))
    codes = torch.tensor([[0, 1, 2, 2, 1, 2]], dtype=torch.uint8)
    _, tensors = pack(CompressedLinear(codes, two, 128))
    assert bytes(tensors["code"][0].tolist()) == bytes([0x9C, 0x02])


def test_golden_bytes_of_a_grid_with_column_scales():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    params = torch.tensor([[[0.5, 3], [2, 0]], [[1, 1], [1, 2]]]).half()  # scale, zero
    codes = torch.tensor([[1, 2, 3, 4, 4], [4, 3, 2, 1, 1]], dtype=torch.uint8)
    linear = CompressedLinear(
        codes,
        LevelTable("grid", 4, params),
        group_size=4,
        column_scale=torch.tensor([1, 1, 1, 2, 0.5]).half(),
    )
    layout, tensors = pack(linear)
    found = {name: bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}
    assert found == {
        "digit0": bytes([0b11100100, 0b11, 0b00011011, 0b00]),
        "levels": bytes([0x00, 0x38, 0x00, 0x40, 0x00, 0x3C, 0x00, 0x3C]),
        "levels_zero": bytes([0b0011, 0b1001]),
        "column_scale": bytes([0x00, 0x3C] * 3 + [0x00, 0x40, 0x00, 0x38]),
    }
    assert unpack(layout, tensors).dequantize().tolist() == [
        [-1.5, -1, -0.5, 0, 3],
        [2, 1, 0, -2, -1],
    ]


def test_golden_bytes_of_single_salient_weights():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    codes = torch.tensor([[1, 2, 200, 2, 1, 255]], dtype=torch.uint8)
    linear = CompressedLinear(
        codes,
        LevelTable("symmetric", 1, torch.full((1, 1, 1), 0.25).half()),
        group_size=128,
        salient=torch.tensor([[0, 0, 1, 0, 0, 1]], dtype=torch.bool),
        salient_levels=LevelTable("grid", 255, torch.tensor([[[0.5, 100]]]).half()),
        salient_group_size=6,
    )
    layout, tensors = pack(linear)
    found = {name: bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}
    assert found == {
        "code": bytes([0 + 3 + 18 + 27 + 0, 2]),  # trits 0 1 2 1 0 | 2, 2 = salient
        "levels": bytes([0x00, 0x34]),
        "salient_codes": bytes([199, 254]),
        "salient_levels": bytes([0x00, 0x38]),
        "salient_levels_zero": bytes([100]),
    }
    assert unpack(layout, tensors).dequantize().tolist() == [[-0.25, 0.25, 49.5, 0.25, -0.25, 77]]


def test_golden_bytes_of_values_under_a_mask():
    """Worked out by hand. These bytes may change only together with FORMAT_VERSION."""
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    values = (torch.tensor([[1.0, 0, 0, 0, 0, 2], [0, -1, 1, 0, 1, 1]]) * mask).half()

    def found(linear):
        return {
            name: bytes(t.view(torch.uint8).flatten().tolist())
            for name, t in pack(linear)[1].items()
        }

    one, two, minus, zero = b"\x00\x3c", b"\x00\x40", b"\x00\xbc", b"\x00\x00"
    assert found(SparseLinear(values, mask)) == {
        "bitmap": bytes([0b100101, 0b110110]),
        "values": one + zero + two + minus + one * 3,
    }
    mask[0, 4] = True  # 2:4, the last group has two of two columns
    assert found(SparseLinear(values, mask, nm=(2, 4))) == {
        # patterns 0101 (number 1) and 0011 (0); 0110 (2) and 0011
        "mask": bytes([0b000_001, 0b000_010]),
        "values": one + zero + zero + two + minus + one * 3,
    }
    mask = mask[:1].expand(2, -1).contiguous()
    assert found(SparseLinear(values * mask, mask, structured=True)) == {
        "columns": bytes([0b110101]),
        "values": one + zero + zero + two + zero + one * 3,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("structured", [False, True])
def test_sparse_round_trip_of_every_tail_and_over_several_row_chunks(dtype, structured):
    for cols in range(1, 34):
        assert_round_trip(make_sparse(2, cols, (4, 8), dtype=dtype, seed=cols))
        assert_round_trip(make_sparse(2, cols, None, structured, dtype, seed=cols))
    assert_round_trip(make_sparse(1030, 2050, None, structured, dtype))


def test_single_salient_weights_round_trip_over_several_row_chunks():
    table = ("symmetric", 1), ("grid", 255)
    for nm in (None, (4, 8)):
        assert_round_trip(make_linear(1030, 2050, nm, *table, elements=True))


def test_structured_pruning_stores_the_kept_columns_only():
    linear = make_linear(64, 128, None, ("pairs", 1), None, structured=True)
    layout, tensors = pack(linear)
    kept = int((linear.codes[0] > 0).sum())
    assert layout.kept_columns == kept < 128
    assert tensors["sign"].shape == (64, -(-kept // 8))
    assert tensors["columns"].shape == (16,)


def _random_bytes(layout: AnyLayout, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, field in layout.fields().items():
        data = torch.randint(256, (field.nbytes,), dtype=torch.uint8, generator=g)
        tensors[name] = data.view(field.dtype).view(field.shape)
    return tensors


def assert_valid_or_refused(layout: AnyLayout, tensors: dict[str, torch.Tensor]) -> bool:
    try:
        found = unpack(layout, tensors)
    except FormatError as error:
        assert any(f"'{name}'" in str(error) for name in layout.fields())
        return False
    pack(found)  # refuses whatever breaks a rule
    assert found.dequantize().isfinite().all()
    return True


@given(linears(), st.integers(0, 2**32), st.booleans())
@settings(max_examples=200, **SLOW)
def test_random_bytes_decode_to_a_valid_linear_or_are_refused(linear, seed, finite):
    layout, tensors = pack(linear)
    noise = _random_bytes(layout, seed)
    if finite:
        noise |= {name: t for name, t in tensors.items() if t.is_floating_point()}
    assert_valid_or_refused(layout, noise)


@given(linears(), st.data())
@settings(max_examples=200, **SLOW)
def test_a_changed_byte_decodes_to_a_valid_linear_or_is_refused(linear, data):
    layout, tensors = pack(linear)
    name = data.draw(st.sampled_from(list(tensors)))
    flat = tensors[name].clone().view(torch.uint8).flatten()
    flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    tensors[name] = flat.view(tensors[name].dtype).view(tensors[name].shape)
    assert_valid_or_refused(layout, tensors)


def _refused(linear, name, words, change):
    layout, tensors = pack(linear)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors[name])
    with pytest.raises(FormatError, match=f"'{name}' {words}"):
        unpack(layout, tensors)


def test_counts_that_do_not_fit_the_layout_are_refused():
    single = make_linear(4, 64, None, ("free", 2), ("grid", 200), elements=True)
    _refused(single, "code", "marks .* salient", lambda t: t.fill_(2 + 6 + 18 + 54 + 162))
    _refused(single, "code", "marks .* salient", lambda t: t.zero_())
    _refused(single, "salient_codes", "holds a number beyond the 200", lambda t: t.fill_(200))
    grid = make_linear(4, 64, None, ("grid", 5), None)
    _refused(grid, "levels_zero", "holds a number beyond the 5", lambda t: t.fill_(255))
    free = make_sparse(4, 64, None)
    _refused(free, "bitmap", "keeps more than", lambda t: t.fill_(255))
    _refused(free, "bitmap", "keeps .* instead of", lambda t: t[0].zero_())
    columns = make_sparse(4, 64, None, structured=True)
    _refused(columns, "columns", "does not keep", lambda t: t.fill_(255))
    _refused(columns, "values", "holds a value that is not finite", lambda t: t.fill_(torch.inf))


def _damage(tensors: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    return {**tensors, name: torch.full_like(tensors[name], value)}


@pytest.mark.parametrize(
    ("kwargs", "name", "value"),
    [
        ({}, "mask", 255),  # 127 is no pattern of 4:8
        ({}, "digit1", 243),
        ({"levels": ("free", 6), "salient": None}, "digit0", 255),
        ({}, "levels", float("inf")),
        ({}, "salient_levels", float("nan")),
        ({"nm": None, "zeros": True, "levels": ("free", 2), "salient": None}, "code", 250),
    ],
)
def test_values_out_of_range_are_refused_by_field(kwargs, name, value):
    layout, tensors = pack(make_linear(4, 64, **kwargs))
    with pytest.raises(FormatError, match=f"'{name}'"):
        unpack(layout, _damage(tensors, name, value))


@pytest.mark.parametrize("levels", [("pairs", 3), ("free", 6), ("residual", 3)])
@pytest.mark.parametrize("nm", [(4, 8), None])
def test_a_level_index_beyond_a_salient_columns_table_is_refused(levels, nm):
    linear = make_linear(4, 64, nm, levels, ("residual", 1), seed=3)
    layout, tensors = pack(linear)
    tensors["salient"] = torch.full_like(tensors["salient"], 255)
    with pytest.raises(FormatError, match="level index"):
        unpack(layout, tensors)


def test_a_mask_that_keeps_virtual_columns_is_refused():
    layout, tensors = pack(make_linear(1, 11, (2, 8), salient=None))
    # pattern 27 of 2:8 keeps columns 6 and 7, but only three columns of group 1 are real
    tensors["mask"] = torch.tensor([[27 << 5 & 255, 27 >> 3]], dtype=torch.uint8)
    with pytest.raises(FormatError, match="'mask' keeps columns beyond"):
        unpack(layout, tensors)


def test_fields_that_do_not_match_the_layout_are_refused():
    layout, tensors = pack(make_linear(4, 64))
    short = {name: tensor for name, tensor in tensors.items() if name != "sign"}
    with pytest.raises(FormatError, match="'sign' is missing"):
        unpack(layout, short)
    with pytest.raises(FormatError, match="'extra'"):
        unpack(layout, {**tensors, "extra": tensors["sign"]})
    with pytest.raises(FormatError, match=r"'mask' is .*\(3, 7\).*\(4, 7\)"):
        unpack(layout, {**tensors, "mask": tensors["mask"][:3]})
    with pytest.raises(FormatError, match=r"'levels' is torch\.float32"):
        unpack(layout, {**tensors, "levels": tensors["levels"].float()})


def _with_code(linear: CompressedLinear, row: int, col: int, code: int) -> CompressedLinear:
    codes = linear.codes.clone()
    codes[row, col] = code
    return replace(linear, codes=codes)


def test_pack_refuses_broken_nm_and_names_the_place():
    linear = make_linear(5, 20, (4, 8), salient=None)
    col = int(linear.codes[3, 8:16].nonzero()[0]) + 8
    with pytest.raises(ValueError, match=r"4:8: row 3 keeps 3 of columns 8\.\.15 instead of 4"):
        pack(_with_code(linear, 3, col, 0))
    with pytest.raises(ValueError, match=r"row 1 keeps 3 of columns 16\.\.19 instead of 4"):
        pack(_with_code(linear, 1, 17, 0))
    with pytest.raises(ValueError, match="8:8: row 2"):
        pack(_with_code(make_linear(5, 20, (8, 8)), 2, 4, 0))


def test_pack_names_the_row_of_a_later_chunk():
    linear = make_linear(1030, 2048, (4, 8), salient=None)
    col = int(linear.codes[1029].nonzero()[0])
    with pytest.raises(ValueError, match="row 1029 keeps 3"):
        pack(_with_code(linear, 1029, col, 0))


def test_pack_refuses_codes_beyond_their_columns_levels():
    linear = make_linear(5, 300, None, seed=1)
    ordinary = int((~linear.salient[128:256]).nonzero()[0]) + 128
    salient = int(linear.salient.nonzero()[0])
    with pytest.raises(ValueError, match=rf"row 4, column {ordinary} \(column group 1\) is 7"):
        pack(_with_code(linear, 4, ordinary, 7))
    with pytest.raises(ValueError, match=rf"row 2, column {salient} .* is 5, above its 4"):
        pack(_with_code(linear, 2, salient, 5))


def test_pack_refuses_levels_that_are_not_finite():
    linear = make_linear(5, 300)
    linear.levels.params[3, 2, 1] = float("inf")
    with pytest.raises(FormatError, match="levels: row 3, column group 2"):
        pack(linear)
    linear = make_linear(5, 300)
    linear.salient_levels.params[0, 1, 0] = float("nan")
    with pytest.raises(FormatError, match="salient_levels: row 0, column group 1"):
        pack(linear)


def test_pack_refuses_tensors_of_the_wrong_shape_or_dtype():
    linear = make_linear(5, 300)
    with pytest.raises(ValueError, match="uint8"):
        pack(replace(linear, codes=linear.codes.long()))
    with pytest.raises(ValueError, match="salient must be bool"):
        pack(replace(linear, salient=linear.salient[:-1]))
    with pytest.raises(ValueError, match="together"):
        pack(replace(linear, salient=None))
    with pytest.raises(ValueError, match=r"levels: parameters must be float16 \(5, 5, 6\)"):
        pack(replace(linear, group_size=64))
    floats = replace(linear.levels, params=linear.levels.params.float())
    with pytest.raises(ValueError, match="levels: parameters must be float16"):
        pack(replace(linear, levels=floats))


def test_pack_refuses_results_that_break_their_own_rules():
    grid = make_linear(5, 300, None, ("grid", 4), None)
    for zero in (4, -1, 0.5):
        params = grid.levels.params.clone()
        params[2, 1, 1] = zero
        with pytest.raises(ValueError, match=r"row 2, column group 1 has a zero point .* 0 to 3"):
            pack(replace(grid, levels=replace(grid.levels, params=params)))
    scaled = make_linear(5, 300, column_scale=True)
    with pytest.raises(ValueError, match=r"column_scale must be float16 \(300,\)"):
        pack(replace(scaled, column_scale=torch.ones(300)))
    scaled.column_scale[7] = torch.inf
    with pytest.raises(FormatError, match="column_scale: column 7"):
        pack(scaled)
    single = make_linear(5, 300, None, ("free", 2), ("grid", 200), elements=True)
    row, col = single.salient.nonzero()[0].tolist()
    with pytest.raises(ValueError, match=rf"row {row}, column {col} is salient but pruned"):
        pack(_with_code(single, row, col, 0))
    columns = make_linear(5, 300, None, ("pairs", 3), None, structured=True)
    col = int((columns.codes[0] > 0).nonzero()[0])
    with pytest.raises(ValueError, match=rf"row 3 differs from row 0 in column {col}"):
        pack(_with_code(columns, 3, col, 0))


def test_pack_refuses_values_that_break_their_own_rules():
    linear = make_sparse(5, 40, (4, 8))
    row, col = (~linear.mask).nonzero()[0].tolist()
    values = linear.values.clone()
    values[row, col] = 1
    with pytest.raises(ValueError, match=rf"row {row}, column {col} is pruned by the mask"):
        pack(replace(linear, values=values))
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        pack(replace(linear, values=linear.values.float()))
    with pytest.raises(ValueError, match="mask must be bool"):
        pack(replace(linear, mask=linear.mask[:1]))
    with pytest.raises(ValueError, match="break 3:8"):
        pack(replace(linear, nm=(3, 8)))
    with pytest.raises(ValueError, match="whole columns"):
        pack(replace(linear, nm=None, structured=True))
    row, col = linear.mask.nonzero()[0].tolist()
    linear.values[row, col] = torch.nan
    with pytest.raises(FormatError, match=rf"row {row}, column {col} is not finite"):
        pack(linear)
