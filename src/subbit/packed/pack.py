"""A compressed linear as packed tensors and back, without loss (`record` alone is not stored)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable
from subbit.errors import FormatError
from subbit.packed.codecs import pack_bits, pack_digits
from subbit.packed.decode import check_tensors, decode_codes, decode_salient, limits
from subbit.packed.layout import Layout
from subbit.packed.masks import mask_index_bits, mask_to_index, tail_columns

__all__ = ["pack", "row_chunks", "slice_rows", "unpack"]

_CHUNK_WEIGHTS = 1 << 20  # keeps scratch memory small and, on a CPU, near the caches


def row_chunks(layout: Layout) -> Iterator[tuple[int, int]]:
    """Ranges of rows, `(start, stop)`, that are worked on at a time (about a million weights)."""
    step = max(1, _CHUNK_WEIGHTS // layout.cols)
    for start in range(0, layout.rows, step):
        yield start, min(start + step, layout.rows)


def slice_rows(
    layout: Layout, tensors: Mapping[str, Tensor], start: int, stop: int
) -> tuple[Layout, dict[str, Tensor]]:
    """Rows `start:stop` of a packed linear, itself a packed linear; the tensors are views."""
    views = {name: t if name == "salient" else t[start:stop] for name, t in tensors.items()}
    return replace(layout, rows=stop - start), views


def pack(linear: CompressedLinear) -> tuple[Layout, dict[str, Tensor]]:
    """Pack one linear; the tensors are those of `Layout.fields()`, in that order.

    Raises:
        ValueError: codes, levels or mask that break the rules of `CompressedLinear`.
        FormatError: a level parameter that is not finite in float16, or a structure that the
            format cannot hold. Both name the row and the columns at fault.
    """
    layout = _layout_of(linear)
    _check_codes(linear, layout)
    parts = [
        _pack_rows(layout, linear.codes[start:stop], linear.salient, start)
        for start, stop in row_chunks(layout)
    ]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["levels"] = linear.levels.params.contiguous()
    if linear.salient is not None and linear.salient_levels is not None:
        tensors["salient"] = pack_bits(linear.salient[None], 1)[0]
        tensors["salient_levels"] = linear.salient_levels.params.contiguous()
    if linear.levels.scale is not None:
        tensors["scale"] = linear.levels.scale.contiguous()
    return layout, tensors


def unpack(layout: Layout, tensors: Mapping[str, Tensor]) -> CompressedLinear:
    """Undo `pack`; the level tables share memory with `tensors`, `record` is empty.

    Raises:
        FormatError: tensors that are not what `layout` says, or bytes that mean no valid linear;
            the message names the field.
    """
    check_tensors(layout, tensors)
    salient = decode_salient(layout, tensors)
    codes = torch.empty(
        layout.rows, layout.cols, dtype=torch.uint8, device=tensors["levels"].device
    )
    for start, stop in row_chunks(layout):
        codes[start:stop] = decode_codes(*slice_rows(layout, tensors, start, stop), salient)
    salient_levels = None
    if layout.salient is not None:
        salient_levels = LevelTable(
            *layout.salient, tensors["salient_levels"], tensors.get("scale")
        )
    levels = LevelTable(*layout.levels, tensors["levels"], tensors.get("scale"))
    return CompressedLinear(codes, levels, layout.group_size, layout.nm, salient, salient_levels)


def _layout_of(linear: CompressedLinear) -> Layout:
    codes, salient = linear.codes, linear.salient
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(
            f"codes must be a non-empty uint8 matrix, not {codes.dtype} {tuple(codes.shape)}."
        )
    if (salient is None) != (linear.salient_levels is None):
        raise ValueError("salient and salient_levels must be given together or not at all.")
    if salient is not None and (salient.dtype != torch.bool or salient.shape != codes.shape[1:]):
        raise ValueError(
            f"salient must be bool ({codes.shape[1]},), not {salient.dtype} {tuple(salient.shape)}."
        )
    extra = linear.salient_levels
    layout = Layout(
        rows=codes.shape[0],
        cols=codes.shape[1],
        group_size=linear.group_size,
        nm=None if linear.nm is None else tuple(linear.nm),
        zeros=linear.nm is None and bool((codes == 0).any()),
        levels=(linear.levels.kind, linear.levels.groups),
        salient=None if extra is None else (extra.kind, extra.groups),
        int8=linear.levels.scale is not None,
    )
    _check_params("levels", linear.levels.params, layout)
    if extra is not None:
        _check_params("salient_levels", extra.params, layout)
        _check_shared_scale(linear.levels.scale, extra.scale)
    if linear.levels.scale is not None:
        _check_params("scale", linear.levels.scale, layout)
    return layout


def _check_params(name: str, params: Tensor, layout: Layout) -> None:
    shape, dtype = layout.fields()[name]
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shared_scale(scale: Tensor | None, other: Tensor | None) -> None:
    if (scale is None) != (other is None) or (scale is not None and not scale.equal(other)):
        raise ValueError("levels and salient_levels must have the same int8 scale, or none.")


def _check_codes(linear: CompressedLinear, layout: Layout) -> None:
    salient = linear.salient
    if salient is None:
        salient = linear.codes.new_zeros(layout.cols, dtype=torch.bool)
    highest = limits(layout, salient)
    for start, stop in row_chunks(layout):
        bad = linear.codes[start:stop] > highest
        if bad.any():
            row, col = bad.nonzero()[0].tolist()
            code = int(linear.codes[start + row, col])
            raise ValueError(
                f"codes: row {start + row}, column {col} (column group "
                f"{col // layout.group_size}) is {code}, above its {int(highest[col])} levels."
            )


def _pack_rows(
    layout: Layout, codes: Tensor, salient: Tensor | None, first: int
) -> dict[str, Tensor]:
    """Pack the code fields of some rows, the first of which is row `first`."""
    tensors: dict[str, Tensor] = {}
    flags = None if salient is None else salient.expand_as(codes)
    if layout.nm is not None:
        codes, mask = _pad_and_mask(layout, codes, first)
        if layout.nm[0] < layout.nm[1]:
            bits = mask_index_bits(*layout.nm)
            tensors["mask"] = pack_bits(mask_to_index(mask, layout.nm[0]), bits)
        kept = mask.flatten(1)
        if flags is not None:
            flags = torch.nn.functional.pad(flags, (0, codes.shape[1] - layout.cols))
            flags = flags[kept].view(len(codes), layout.kept)
        codes = codes[kept].view(len(codes), layout.kept)
    index = codes if layout.zeros else codes - 1
    radices = layout.radices()
    for plane in layout.planes():
        digit = _digit(index, radices[0], plane.digit)
        if flags is not None:
            digit = torch.where(flags, _digit(index, radices[1], plane.digit), digit)
        tensors[plane.name] = pack_digits(digit, plane.radix)
    return tensors


def _pad_and_mask(layout: Layout, codes: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Codes with whole M-groups, uint8 `(rows, G * M)`, and their mask, bool `(rows, G, M)`."""
    n, m = layout.nm
    virtual, marked = tail_columns(layout.cols, n, m)
    codes = torch.nn.functional.pad(codes, (0, virtual))
    codes[:, layout.cols : layout.cols + marked] = 1  # level index 0, hence digits 0
    mask = (codes > 0).view(len(codes), -1, m)
    bad = mask.sum(-1, dtype=torch.uint8) != n
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        stop = min((group + 1) * m, layout.cols)
        kept = int(mask[row, group, : stop - group * m].sum())
        raise ValueError(
            f"codes break {n}:{m}: row {first + row} keeps {kept} of columns "
            f"{group * m}..{stop - 1} instead of {min(n, stop - group * m)}."
        )
    return codes, mask


def _digit(index: Tensor, radices: tuple[int, ...], k: int) -> Tensor:
    """Digit k of every level index."""
    scale = 1
    for radix in radices[:k]:
        scale *= radix
    digit = index // scale
    return digit if k == len(radices) - 1 else digit % radices[k]
