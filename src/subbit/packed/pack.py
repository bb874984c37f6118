"""A compressed linear as packed tensors and back, without loss (`record` alone is not stored)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from subbit.codes import Compressed, CompressedLinear, LevelTable, SparseLinear
from subbit.errors import FormatError
from subbit.packed.codecs import join, pack_bits, pack_digits
from subbit.packed.decode import (
    check_tensors,
    decode_codes,
    decode_elements,
    decode_levels,
    decode_salient,
    limits,
)
from subbit.packed.layout import Layout, Table
from subbit.packed.sparse import SparseLayout, pack_sparse, unpack_sparse_rows
from subbit.packed.support import column_bits, damaged

__all__ = [
    "AnyLayout",
    "decode_dense",
    "pack",
    "pack_as",
    "read_layout",
    "row_chunks",
    "slice_rows",
    "unpack",
    "unpack_rows",
]

AnyLayout = Layout | SparseLayout
"""The layout of codes and levels, or of 16-bit values."""

_CHUNK_WEIGHTS = 1 << 20  # keeps scratch memory small and, on a CPU, near the caches


def read_layout(data: dict) -> AnyLayout:
    """Undo `to_dict` of either layout.

    Raises:
        FormatError: an unknown or missing key, or a value that means nothing.
    """
    sparse = isinstance(data, dict) and "values" in data
    return (SparseLayout if sparse else Layout).from_dict(data)


def row_chunks(layout: AnyLayout) -> Iterator[tuple[int, int]]:
    """Ranges of rows, `(start, stop)`, that are worked on at a time (about a million weights)."""
    step = max(1, _CHUNK_WEIGHTS // layout.cols)
    for start in range(0, layout.rows, step):
        yield start, min(start + step, layout.rows)


def slice_rows(
    layout: Layout, tensors: Mapping[str, Tensor], start: int, stop: int
) -> tuple[Layout, dict[str, Tensor]]:
    """Rows `start:stop` of a packed linear, itself a packed linear; the tensors are views.

    Not so where single weights are salient: `salient_codes` stays that of all rows, and how many
    of these rows there are is not known before they are read.
    """
    views = {name: t[start:stop] if t.dim() > 1 else t for name, t in tensors.items()}
    elements = layout.salient_elements
    if elements is not None:
        elements = min(elements, (stop - start) * layout.cols)
    return replace(layout, rows=stop - start, salient_elements=elements), views


def pack(linear: Compressed) -> tuple[AnyLayout, dict[str, Tensor]]:
    """Pack one linear; the tensors are those of `fields()` of the layout, in that order.

    Raises:
        ValueError: codes, levels, values or mask that break the rules of the result's class.
        FormatError: a number that is not finite in 16 bits, or a structure that the
            format cannot hold. Both name the row and the columns at fault.
    """
    if isinstance(linear, SparseLinear):
        return pack_sparse(linear)
    layout = _layout_of(linear)
    return layout, pack_as(layout, linear)


def pack_as(layout: Layout, linear: CompressedLinear) -> dict[str, Tensor]:
    """The tensors of one linear in a layout that may hold more than it needs, as `pack`.

    Some rows of a linear are packed so: its layout says that weights are pruned, and in these rows
    none need be.

    Args:
        layout: what `unpack` gave `linear`, or that of some rows.
    """
    _check_codes(linear, layout)
    parts = [_pack_rows(layout, linear, start, stop) for start, stop in row_chunks(layout)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if layout.kept_columns is not None:
        tensors["columns"] = column_bits(linear.codes[0] > 0)
    for table, levels in zip(layout.tables(), (linear.levels, linear.salient_levels), strict=False):
        tensors |= _pack_levels(table, levels)
    if linear.salient is not None and layout.salient_elements is None:
        tensors["salient"] = column_bits(linear.salient)
    if linear.levels.scale is not None:
        tensors["scale"] = linear.levels.scale
    if linear.column_scale is not None:
        tensors["column_scale"] = linear.column_scale.flatten()
    return {name: tensors[name].contiguous() for name in layout.fields()}


def unpack(layout: AnyLayout, tensors: Mapping[str, Tensor]) -> Compressed:
    """Undo `pack`; float tensors are shared with `tensors`, `record` is empty.

    Raises:
        FormatError: tensors that are not what `layout` says, or bytes that mean no valid linear;
            the message names the field.
    """
    parts = list(unpack_rows(layout, tensors))
    first = parts[0]
    if isinstance(first, SparseLinear):
        values = join([part.values for part in parts])
        return replace(first, values=values, mask=torch.cat([part.mask for part in parts]))
    levels, *salient_levels = (decode_levels(table, tensors) for table in layout.tables())
    elements = layout.salient_elements is not None
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        levels=levels,
        salient=torch.cat([part.salient for part in parts]) if elements else first.salient,
        salient_levels=salient_levels[0] if salient_levels else None,
    )


def decode_dense(layout: AnyLayout, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense weight that packed tensors mean, `dtype` `(rows, cols)`; raises as `unpack`.

    It is made some rows at a time: no more than it and a few megabytes are held.

    Raises:
        ValueError: a dtype without fractions, such as that of token ids.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"weights cannot be {dtype}; activations of a linear are floating-point")
    device = next(iter(tensors.values())).device
    # an inference tensor kept for later would be useless under autograd
    with torch.inference_mode(False), torch.no_grad():
        out = torch.empty(layout.rows, layout.cols, dtype=dtype, device=device)
        parts = unpack_rows(layout, tensors)
        for (start, stop), part in zip(row_chunks(layout), parts, strict=True):
            out[start:stop] = part.dequantize()
    return out


def unpack_rows(layout: AnyLayout, tensors: Mapping[str, Tensor]) -> Iterator[Compressed]:
    """Undo `pack` one range of `row_chunks` at a time, from row 0 on; raises as `unpack`."""
    check_tensors(layout, tensors)
    if isinstance(layout, SparseLayout):
        yield from unpack_sparse_rows(layout, tensors, row_chunks(layout))
        return
    columns = decode_salient(layout, tensors)
    column_scale = tensors.get("column_scale")
    if column_scale is not None and layout.scaled_params:
        column_scale = column_scale.view(layout.scaled_params, layout.cols)
    elements, taken = layout.salient_elements, 0
    for start, stop in row_chunks(layout):
        part_layout, part = slice_rows(layout, tensors, start, stop)
        codes, salient = decode_codes(part_layout, part, columns), columns
        if elements is not None:
            codes, salient = decode_elements(layout, codes, part["salient_codes"][taken:])
            taken += int(salient.sum())
        levels, *salient_levels = (decode_levels(table, part) for table in layout.tables())
        yield CompressedLinear(
            codes,
            levels,
            layout.group_size,
            layout.nm,
            salient,
            salient_levels[0] if salient_levels else None,
            layout.salient_group_size,
            layout.kept_columns is not None,
            column_scale,
        )
    if elements is not None and taken != elements:
        raise damaged("code", f"marks {taken} weights as salient instead of {elements}")


def _layout_of(linear: CompressedLinear) -> Layout:
    codes, salient, extra = linear.codes, linear.salient, linear.salient_levels
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(
            f"codes must be a non-empty uint8 matrix, not {codes.dtype} {tuple(codes.shape)}."
        )
    if (salient is None) != (extra is None):
        raise ValueError("salient and salient_levels must be given together or not at all.")
    elements = salient is not None and salient.dim() == 2
    if salient is not None:
        shape = codes.shape if elements else codes.shape[1:]
        if salient.dtype != torch.bool or salient.shape != shape:
            raise ValueError(
                f"salient must be bool {tuple(shape)}, not {salient.dtype} {tuple(salient.shape)}."
            )
    layout = Layout(
        rows=codes.shape[0],
        cols=codes.shape[1],
        group_size=linear.group_size,
        nm=None if linear.nm is None else tuple(linear.nm),
        zeros=linear.nm is None and not linear.structured and bool((codes == 0).any()),
        levels=(linear.levels.kind, linear.levels.groups),
        salient=None if extra is None else (extra.kind, extra.groups),
        salient_elements=int(salient.sum()) if elements else None,
        salient_group_size=linear.salient_group_size,
        kept_columns=int((codes[0] > 0).sum()) if linear.structured else None,
        column_scale=linear.column_scale is not None,
        scaled_params=_scaled_params(linear.column_scale),
        int8=linear.levels.scale is not None,
        row_scale=_one_scale(linear.levels),
    )
    for table, levels in zip(layout.tables(), (linear.levels, extra), strict=False):
        _check_levels(table, levels, layout.rows)
    if extra is not None:
        _check_shared_scale(linear.levels.scale, extra.scale)
    if linear.levels.scale is not None:
        _check_params("scale", linear.levels.scale, (layout.rows, layout.scales), torch.bfloat16)
    if linear.column_scale is not None:
        _check_scale(linear.column_scale, layout)
    return layout


def _check_params(name: str, params: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if params.dtype != dtype or params.shape != shape:
        raise ValueError(
            f"{name}: parameters must be {_short(dtype)} {shape}, not {params.dtype} "
            f"{tuple(params.shape)}."
        )
    bad = ~params.isfinite().view(*shape[:2], -1).all(-1)
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: row {row}, column group {group} holds a value that is not finite in "
            f"{_short(dtype)}; the weights are too large or damaged for this format."
        )


def _check_levels(table: Table, levels: LevelTable, rows: int) -> None:
    name, params = table.name, levels.params
    width = table.floats + table.integers
    _check_params(name, params, (rows, table.records, width), table.dtype)
    if table.int8 and (bad := (params == -128).any(-1)).any():
        row, group = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: row {row}, column group {group} holds the int8 level -128; levels go from "
            "-127 to 127: choose a larger scale."
        )
    integers = params[..., table.floats :]
    bad = ((integers != integers.round()) | (integers < 0) | (integers >= table.count)).any(-1)
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: row {row}, column group {group} has a zero point that is no whole number "
            f"from 0 to {table.count - 1}."
        )


def _one_scale(levels: LevelTable) -> bool:
    scale = levels.scale
    return scale is not None and scale.dim() == 2 and scale.shape[1] < levels.params.shape[1]


def _scaled_params(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.dim() != 2 else scale.shape[0]


def _check_scale(scale: Tensor, layout: Layout) -> None:
    cols = layout.cols
    if scale.dtype != torch.float16 or scale.dim() > 2 or scale.shape[-1:] != (cols,):
        raise ValueError(
            f"column_scale must be float16 ({cols},) or (S, {cols}), not {scale.dtype} "
            f"{tuple(scale.shape)}."
        )
    bad = (~scale.isfinite()).view(-1, cols).any(0).nonzero()
    if len(bad):
        raise FormatError(
            f"column_scale: column {int(bad[0])} has a factor that is not finite in float16; the "
            "weights are too large or damaged for this format."
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shared_scale(scale: Tensor | None, other: Tensor | None) -> None:
    if (scale is None) != (other is None) or (scale is not None and not scale.equal(other)):
        raise ValueError("levels and salient_levels must have the same int8 scale, or none.")


def _check_codes(linear: CompressedLinear, layout: Layout) -> None:
    salient = linear.salient
    if salient is None:
        salient = linear.codes.new_zeros(layout.cols, dtype=torch.bool)
    for start, stop in row_chunks(layout):
        codes = linear.codes[start:stop]
        flags = (salient if salient.dim() == 1 else salient[start:stop]).expand_as(codes)
        highest = limits(layout, flags)
        bad = codes > highest
        if bad.any():
            row, col = bad.nonzero()[0].tolist()
            raise ValueError(
                f"codes: row {start + row}, column {col} (column group "
                f"{col // layout.group_size}) is {int(codes[row, col])}, above its "
                f"{int(highest[row, col])} levels."
            )
        if layout.salient_elements is not None and (bad := flags & (codes == 0)).any():
            row, col = bad.nonzero()[0].tolist()
            raise ValueError(
                f"codes: row {start + row}, column {col} is salient but pruned; a single salient "
                "weight must be kept."
            )


def _pack_levels(table: Table, levels: LevelTable) -> dict[str, Tensor]:
    params = levels.params
    tensors = {table.name: params[..., : table.floats]}
    if table.integers and table.integer_bits:
        integers = params[..., table.floats :].int().flatten(1)
        tensors[f"{table.name}_zero"] = pack_bits(integers, table.integer_bits)
    return tensors


def _pack_rows(
    layout: Layout, linear: CompressedLinear, start: int, stop: int
) -> dict[str, Tensor]:
    """Pack the code fields of some rows."""
    codes, salient = linear.codes[start:stop], linear.salient
    support = layout.support
    tensors: dict[str, Tensor] = {}
    index = codes if layout.zeros else codes - 1
    flags = None
    if layout.salient_elements is not None:
        salient = salient[start:stop]
        tensors["salient_codes"] = codes[salient] - 1
        index = index.masked_fill(salient, layout.radices()[0][0] - 1)
    elif salient is not None:
        flags = salient.expand_as(codes)
    if layout.nm is not None or layout.kept_columns is not None:
        kept = support.check(codes > 0, start)
        tensors |= support.pack(kept)
        index = support.take(index, kept)
        flags = None if flags is None else support.take(flags, kept)
    radices = layout.radices()
    for plane in layout.planes():
        digit = _digit(index, radices[0], plane.digit)
        if flags is not None:
            digit = torch.where(flags, _digit(index, radices[1], plane.digit), digit)
        tensors[plane.name] = pack_digits(digit, plane.radix)
    return tensors


def _digit(index: Tensor, radices: tuple[int, ...], k: int) -> Tensor:
    """Digit k of every level index."""
    scale = 1
    for radix in radices[:k]:
        scale *= radix
    digit = index // scale
    return digit if k == len(radices) - 1 else digit % radices[k]
