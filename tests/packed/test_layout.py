import json
from dataclasses import fields, replace

import pytest
import torch

from subbit.errors import FormatError
from subbit.packed import Layout, SparseLayout, read_layout

LAYOUT = Layout(
    rows=576,
    cols=1536,
    group_size=128,
    nm=(4, 8),
    zeros=False,
    levels=("pairs", 3),
    salient=("residual", 1),
)


def test_fields_of_the_paper_structure():
    u8, f16 = torch.uint8, torch.float16
    assert LAYOUT.fields() == {
        "mask": ((576, 168), u8),  # 192 groups of 7 bits
        "sign": ((576, 96), u8),  # 768 kept weights of 1 bit
        "digit1": ((576, 154), u8),  # 768 trits, five a byte
        "levels": ((576, 12, 6), f16),
        "salient": ((192,), u8),
        "salient_levels": ((576, 12, 3), f16),
    }
    assert LAYOUT.nbytes == 576 * (168 + 96 + 154 + 12 * 9 * 2) + 192
    assert LAYOUT.bits_per_weight == 8 * LAYOUT.nbytes / (576 * 1536)


@pytest.mark.parametrize(
    ("changes", "planes"),
    [
        ({"salient": None}, [("sign", 0, 2), ("digit1", 1, 3)]),
        ({"salient": ("residual", 3)}, [("sign", 0, 2), ("digit1", 1, 3), ("digit2", 2, 3)]),
        ({"levels": ("pairs", 1)}, [("sign", 0, 2), ("digit1", 1, 2)]),
        ({"levels": ("free", 6)}, [("digit0", 0, 6), ("digit1", 1, 2)]),
        ({"levels": ("free", 1), "salient": None}, []),
        ({"nm": None, "zeros": True}, [("code", 0, 7)]),
        ({"nm": None, "zeros": True, "levels": ("free", 2), "salient": None}, [("code", 0, 3)]),
    ],
)
def test_planes(changes, planes):
    assert replace(LAYOUT, **changes).planes() == planes


def test_no_mask_is_stored_where_every_weight_is_kept():
    assert "mask" not in replace(LAYOUT, nm=(8, 8)).fields()
    assert "mask" not in replace(LAYOUT, nm=None).fields()


@pytest.mark.parametrize("changes", [{}, {"nm": None, "zeros": True, "salient": None}])
def test_json_round_trip(changes):
    layout = replace(LAYOUT, **changes)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 0),
        ("rows", True),
        ("rows", 2.0),
        ("rows", 10**30),
        ("cols", -8),
        ("cols", None),
        ("group_size", "128"),
        ("nm", [8]),
        ("nm", [9, 8]),
        ("nm", [0, 8]),
        ("nm", [4, 32]),
        ("nm", "4:8"),
        ("zeros", 0),
        ("zeros", True),  # with N:M
        ("levels", None),
        ("levels", ["pairs"]),
        ("levels", ["cubic", 3]),
        ("levels", [["pairs"], 3]),
        ("levels", ["pairs", 128]),
        ("levels", ["pairs", 0]),
        ("salient", ["residual", 64]),
        ("salient", {}),
    ],
)
def test_nonsense_is_refused_by_name(key, value):
    with pytest.raises(FormatError, match=key):
        Layout.from_dict({**LAYOUT.to_dict(), key: value})


def test_unknown_and_missing_keys_are_refused():
    data = LAYOUT.to_dict()
    with pytest.raises(FormatError, match=r"'row'; did you mean 'rows'\?"):
        Layout.from_dict({**data, "row": 1})
    del data["zeros"]
    with pytest.raises(FormatError, match="'zeros'"):
        Layout.from_dict(data)
    with pytest.raises(FormatError):
        Layout.from_dict([1, 2])


OPTIONAL = {
    "salient_elements": 9,
    "salient_group_size": 1536,
    "column_scale": True,
}


def test_what_is_not_used_is_not_written():
    assert set(LAYOUT.to_dict()) == {
        "rows", "cols", "group_size", "nm", "zeros", "levels", "salient",
    }  # fmt: skip
    full = replace(LAYOUT, **OPTIONAL)
    assert full.to_dict() == LAYOUT.to_dict() | OPTIONAL
    assert read_layout(json.loads(json.dumps(full.to_dict()))) == full


def test_fields_of_grids_single_salient_weights_and_column_scales():
    layout = replace(LAYOUT, levels=("grid", 8), nm=None, salient=None, column_scale=True)
    assert layout.fields() == {
        "digit0": ((576, 576), torch.uint8),  # 1536 digits of 3 bits
        "levels": ((576, 12, 1), torch.float16),
        "levels_zero": ((576, 5), torch.uint8),  # 12 of 3 bits
        "column_scale": ((1536,), torch.float16),
    }
    layout = replace(LAYOUT, levels=("symmetric", 1), nm=None, salient=("grid", 255), **OPTIONAL)
    assert layout.fields() == {
        "code": ((576, 308), torch.uint8),  # 1536 trits
        "levels": ((576, 12, 1), torch.float16),
        "salient_codes": ((9,), torch.uint8),
        "salient_levels": ((576, 1, 1), torch.float16),
        "salient_levels_zero": ((576, 1), torch.uint8),
        "column_scale": ((1536,), torch.float16),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("salient_elements", 0),
        ("salient_elements", 576 * 1536 + 1),
        ("salient_elements", True),
        ("salient_group_size", 128),  # without single salient weights
        ("kept_columns", 5),  # with N:M
        ("column_scale", 1),
    ],
)
def test_optional_nonsense_is_refused_by_name(key, value):
    with pytest.raises(FormatError, match=key):
        Layout.from_dict({**LAYOUT.to_dict(), key: value})


def test_one_code_is_left_for_single_salient_weights():
    with pytest.raises(FormatError, match="salient_elements"):
        replace(LAYOUT, nm=None, levels=("free", 255), salient_elements=3)
    with pytest.raises(FormatError, match="salient_elements"):
        replace(LAYOUT, nm=None, salient=None, salient_elements=3)


SPARSE = SparseLayout(576, 100, "float16", nm=(4, 8))


def test_fields_of_16_bit_values():
    f16, u8 = torch.float16, torch.uint8
    assert SPARSE.fields() == {"mask": ((576, 12), u8), "values": ((576, 52), f16)}
    columns = SparseLayout(576, 100, "bfloat16", kept_columns=40)
    assert columns.fields() == {"columns": ((13,), u8), "values": ((576, 40), torch.bfloat16)}
    single = SparseLayout(576, 100, "float16", elements=999)
    assert single.fields() == {"bitmap": ((576, 13), u8), "values": ((999,), f16)}
    for layout in (SPARSE, columns, single):
        assert read_layout(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 0),
        ("values", "float32"),
        ("values", None),
        ("nm", [9, 8]),
        ("nm", None),  # neither N:M, nor columns, nor single weights
        ("elements", 5),  # with N:M
        ("kept_columns", 101),
        ("group_size", 128),
    ],
)
def test_sparse_nonsense_is_refused(key, value):
    with pytest.raises(FormatError):
        read_layout({**SPARSE.to_dict(), key: value})


ANY_JSON = [
    *(None, True, False, -1, 0, 1, 3, 2**40, 1.5, float("nan"), "", "a", "float16", {}, {"a": 1}),
    *([], [1], [4, 8], [1, None], [[1], 2], ["pairs", 3], ["pairs", "a"], [{}, 3], [["pairs"], 3]),
]
LAYOUTS = {
    "levels": LAYOUT,
    "elements": replace(LAYOUT, nm=None, salient_elements=9, salient_group_size=64),
    "int8": replace(LAYOUT, int8=True, row_scale=True),
    "sparse": SPARSE,
    "single": SparseLayout(576, 100, "float16", elements=999),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_of_any_type_is_refused_or_means_a_layout(name):
    layout = LAYOUTS[name]
    for key in (field.name for field in fields(layout)):
        for value in ANY_JSON:
            try:
                found = read_layout({**layout.to_dict(), key: value})
            except FormatError:
                continue
            assert found.nbytes > 0  # with tensors of some size
