"""The resident layouts B3 and B2: what a packed linear is expanded to when it is loaded.

B3 has codes of three bits, 3.75 bits a weight with its levels; B2 has two and 2.375, and holds the
linears that have at most four levels and no salient columns. First B3:

A tile is 4 rows x 128 columns. A code has three bits: 0 = pruned, 1..6 = ordinary level, in a
salient column 1..4 = salient level. A linear without salient levels has one more, 1..7, and, where
nothing is pruned, an eighth with code 0. A tile's codes are three planes A, B, C of 64 bytes; byte
`16 r + j` belongs to row r and columns `16 k + j`, k = 0..7:

- A: k=0 in bits 0-2, k=1 in bits 3-5, low two bits of k=6 in bits 6-7;
- B: k=2, k=3, low two bits of k=7 likewise;
- C: k=4 in bits 0-2, k=5 in bits 3-5, bit 2 of k=6 in bit 6, bit 2 of k=7 in bit 7.

A row's level record is 12 bytes: 6 ordinary and 4 salient levels, each int8 + 128 (absent levels
128), then the scale, bfloat16, little-endian. A seventh and an eighth ordinary level have the
places of the first two salient ones.

A unit is 16 rows x 128 columns, 960 bytes: the planes of its four tiles (A, B, C of the first...),
then its 16 records: whole cache lines, read from front to back. Units follow each other along the
columns, then down the rows. Rows and columns that do not exist have code 0; such rows have scale 0.
If at most 64 columns are left for the last unit of 16 rows, its tiles have no plane C and no k > 3:
704 bytes. `flags`, one byte a column shared by all rows, is 8 in salient columns, else 0, and one
byte more says whether there are salient levels. If so, code | flag is the place of a weight's level
in `0, l1..l6, s1, 0, s1..s4, 0, 0, 0`; if not, code is its place in `l8, l1..l7`.

B2 is the same but for this: a code is 0 = pruned or a fourth level, or 1..3, its place in
`l4, l1..l3`. Plane A has k = 0..3 and plane B k = 4..7, each in two bits, k = 0 and 4 the lowest;
there is no C. A record is 6 bytes: 4 levels and the scale. A unit is 608 bytes; one of at most 64
columns has no B: 352. All `flags` are 0. The number of bytes says which layout it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable
from subbit.packed.codecs import join
from subbit.packed.decode import check_tensors
from subbit.packed.layout import Layout
from subbit.packed.pack import AnyLayout, pack_as, slice_rows, unpack

__all__ = [
    "BLOCK",
    "UNIT_ROWS",
    "check_sizes",
    "code_bits",
    "collapse",
    "dense_rows",
    "expand",
    "fits",
    "sizes",
]

BLOCK = 128
UNIT_ROWS = 16
"""A range of rows that is worked on by itself starts at a multiple of this."""

_TILES = 4
_PLANE = 64
_ORDINARY, _SALIENT = 6, 4
_CHUNK_WEIGHTS = 1 << 20  # as in packed/pack.py: scratch memory stays small


@dataclass(frozen=True)
class _Form:
    """What B3 and B2 differ in.

    Attributes:
        bits: of a code.
        alone: ordinary levels at most without salient ones; one more where nothing is pruned.
        places: places for levels in a record.
    """

    bits: int
    alone: int
    places: int

    @property
    def record(self) -> int:
        """Bytes of a level record."""
        return self.places + 2

    def planes(self, half: bool) -> int:
        """Code planes of a tile."""
        return -(-self.bits // 2) if half else self.bits

    def unit(self, half: bool = False) -> int:
        """Bytes of a unit."""
        return self.planes(half) * _TILES * _PLANE + UNIT_ROWS * self.record

    def stride(self, cols: int) -> int:
        """Bytes of one row of units."""
        full, half = _blocks(cols)
        return full * self.unit() + half * self.unit(half=True)


_B3 = _Form(bits=3, alone=7, places=_ORDINARY + _SALIENT)
_B2 = _Form(bits=2, alone=3, places=4)
_FORMS = {form.bits: form for form in (_B2, _B3)}


def fits(layout: AnyLayout) -> bool:
    """Whether a linear can be held so: few int8 levels, one record for each 128 columns.

    Neither column scales, nor whole pruned columns, nor single salient weights.
    """
    if not isinstance(layout, Layout) or layout.column_scale or layout.kept_columns is not None:
        return False
    return (
        layout.int8
        and layout.salient_elements is None
        and (layout.groups == 1 or layout.group_size % BLOCK == 0)
        and code_bits(layout) is not None
    )


def code_bits(layout: Layout) -> int | None:
    """Bits of a code in the smaller layout that has places for all levels; None = neither has."""
    counts = layout.level_counts()
    if layout.salient is not None:
        return 3 if counts[0] <= _ORDINARY and counts[-1] <= _SALIENT else None
    unpruned = layout.nm is None and not layout.zeros
    return next((f.bits for f in (_B2, _B3) if counts[0] <= f.alone + unpruned), None)


def _blocks(cols: int) -> tuple[int, bool]:
    """Full units of a row of units, and whether a half one follows."""
    full, rest = divmod(cols, BLOCK)
    half = 0 < rest <= BLOCK // 2
    return full + (rest > 0 and not half), half


def sizes(rows: int, cols: int, bits: int = 3) -> tuple[int, int]:
    """Bytes of `tiles` and of `flags` of a linear `(rows, cols)` whose codes have `bits` bits."""
    full, half = _blocks(cols)
    strips = -(-rows // UNIT_ROWS)
    return strips * _FORMS[bits].stride(cols), full * BLOCK + half * BLOCK // 2 + 1


@cache
def _known_sizes(rows: int, cols: int) -> tuple[dict[int, int], int]:
    """Bytes of `tiles` -> bits of a code, and bytes of `flags`; asked for at every product."""
    return {sizes(rows, cols, bits)[0]: bits for bits in _FORMS}, sizes(rows, cols)[1]


def check_sizes(tiles: Tensor, flags: Tensor, rows: int, cols: int) -> int:
    """Refuse bytes that are no linear `(rows, cols)`.

    Returns:
        Bits of a code, which the number of bytes tells.

    Raises:
        ValueError: bytes too few or too many, or no bytes.
    """
    forms, width = _known_sizes(rows, cols)
    bits = forms.get(tiles.numel())
    if bits and flags.numel() == width and tiles.dtype == flags.dtype == torch.uint8:
        return bits
    raise ValueError(
        f"tiles and flags of a linear ({rows}, {cols}) must be {' or '.join(map(str, forms))} and "
        f"{width} of torch.uint8, not {tiles.numel()} of {tiles.dtype} and {flags.numel()} of "
        f"{flags.dtype}."
    )


def _chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // (UNIT_ROWS * cols)) * UNIT_ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def expand(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Expand a packed linear for which `fits`, some rows at a time.

    Returns:
        `tiles` and `flags`, uint8, flat, of `sizes` bytes, on the device of `tensors`.

    Raises:
        FormatError: tensors that mean no valid linear, as in `unpack`.
    """
    check_tensors(layout, tensors)  # parts of tensors of other sizes would look right
    device = tensors["levels"].device
    form = _FORMS[code_bits(layout)]
    count, width = sizes(layout.rows, layout.cols, form.bits)
    tiles = torch.empty(count, dtype=torch.uint8, device=device)
    flags = torch.zeros(width, dtype=torch.uint8, device=device)
    flags[-1] = layout.salient is not None
    stride = form.stride(layout.cols)
    for start, stop in _chunks(layout.rows, layout.cols):
        part = unpack(*slice_rows(layout, tensors, start, stop))
        first, last = start // UNIT_ROWS, -(-stop // UNIT_ROWS)
        tiles[first * stride : last * stride] = _units(part, form).view(-1)
        if part.salient is not None:
            flags[: layout.cols] = 8 * part.salient
    return tiles, flags


def collapse(layout: Layout, tiles: Tensor, flags: Tensor) -> dict[str, Tensor]:
    """Undo `expand`: the packed tensors of `layout.fields()`."""
    parts, form = [], _FORMS[check_sizes(tiles, flags, layout.rows, layout.cols)]
    for start, stop in _chunks(layout.rows, layout.cols):
        own = replace(layout, rows=stop - start)
        found = _rows_of(form, tiles, layout.cols, start, stop)
        parts.append(pack_as(own, _compressed(own, *found, flags)))
    return {
        name: parts[0][name] if name == "salient" else join([part[name] for part in parts])
        for name in layout.fields()
    }


def dense_rows(
    tiles: Tensor,
    flags: Tensor,
    rows: int,
    cols: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode rows `start:stop`, `start` a multiple of 16: `dtype` `(stop - start, cols)`.

    Raises:
        ValueError: bytes that are no linear `(rows, cols)`.
    """
    form = _FORMS[check_sizes(tiles, flags, rows, cols)]
    codes, levels, scale = _rows_of(form, tiles, cols, start, stop)
    table = levels.new_zeros(*levels.shape[:2], 16)
    table[..., 1 : 1 + form.alone] = levels[..., : form.alone]
    if flags[-1]:
        table[..., 9 : 9 + _SALIENT] = levels[..., _ORDINARY:]
    else:
        table[..., 0] = levels[..., form.alone]
    values = (table.float() * scale.float().unsqueeze(-1)).to(dtype)
    width = values.shape[1] * BLOCK
    index = torch.nn.functional.pad(codes | flags[: codes.shape[1]], (0, width - codes.shape[1]))
    index = index.view(stop - start, -1, BLOCK).long()
    return values.gather(-1, index).view(stop - start, width)[:, :cols]


def _records(part: CompressedLinear, blocks: int, form: _Form) -> Tensor:
    """Level records of some rows, uint8 `(rows, blocks, form.record)`."""
    rows, ngroups = part.levels.params.shape[:2]
    records = part.codes.new_full((rows, ngroups, form.record), 128)
    tables = [(0, part.levels), (_ORDINARY, part.salient_levels)]
    for start, table in tables:
        if table is not None:
            shifted = table.params.view(torch.uint8) ^ 128  # int8 + 128
            records[..., start : start + shifted.shape[-1]] = shifted
    scale = part.levels.scale.expand(rows, ngroups).contiguous()  # it may be one for the row
    records[..., -2:] = scale.view(torch.uint8).view(rows, ngroups, 2)
    return records[:, _group_of_block(part.group_size, ngroups, blocks, records.device)]


def _group_of_block(group_size: int, ngroups: int, blocks: int, device: torch.device) -> Tensor:
    """Which column group's record each 128 columns use, int64 `(blocks,)`."""
    group = torch.arange(blocks, device=device) * BLOCK // group_size
    return group.clamp_(max=ngroups - 1)


def _units(part: CompressedLinear, form: _Form) -> Tensor:
    """Rows of units, uint8 `(rows of units, stride)`."""
    rows, cols = part.shape
    full, half = _blocks(cols)
    down, across = -(-rows // UNIT_ROWS), full + half
    missing = down * UNIT_ROWS - rows
    codes = part.codes & (2**form.bits - 1)  # the level after the last one has code 0
    codes = torch.nn.functional.pad(codes, (0, across * BLOCK - cols, 0, missing))
    # (unit row, tile, row, unit column, k, j) -> k, (unit row, unit column, tile, 16 row + j)
    k = codes.view(down, _TILES, 4, across, 8, 16).permute(4, 0, 3, 1, 2, 5)
    planes = _planes(k.reshape(8, down, across, _TILES, _PLANE), form)
    records = _records(part, across, form)
    if missing:
        empty = records.new_full((missing, across, form.record), 128)
        empty[..., -2:] = 0
        records = torch.cat((records, empty))
    records = records.view(down, UNIT_ROWS, across, form.record).transpose(1, 2).flatten(2)
    body = torch.cat((planes[:, :full].flatten(2), records[:, :full]), -1).flatten(1)
    if not half:
        return body
    first = planes[:, full, :, : form.planes(half=True)]
    return torch.cat((body, first.flatten(1), records[:, full]), -1)


def _planes(k: Tensor, form: _Form) -> Tensor:
    """Codes of the eight groups of 16 columns as code planes: `(8, ...)` -> `(..., planes, 64)`."""
    if form is _B2:
        halves = (k[:4], k[4:])
        return torch.stack([h[0] | h[1] << 2 | h[2] << 4 | h[3] << 6 for h in halves], -2)
    return torch.stack(
        (
            k[0] | k[1] << 3 | (k[6] & 3) << 6,
            k[2] | k[3] << 3 | (k[7] & 3) << 6,
            k[4] | k[5] << 3 | (k[6] >> 2) << 6 | (k[7] >> 2) << 7,
        ),
        -2,
    )


def _codes(planes: Tensor, form: _Form) -> Tensor:
    """Undo `_planes`."""
    if form is _B2:
        return torch.stack([p >> bit & 3 for p in planes.unbind(-2) for bit in (0, 2, 4, 6)])
    A, B, C = planes.unbind(-2)
    return torch.stack(
        (
            A & 7,
            A >> 3 & 7,
            B & 7,
            B >> 3 & 7,
            C & 7,
            C >> 3 & 7,
            A >> 6 | (C >> 4 & 4),
            B >> 6 | (C >> 5 & 4),
        )
    )


def _rows_of(
    form: _Form, tiles: Tensor, cols: int, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode rows `start:stop`, `start` a multiple of 16.

    Returns:
        codes uint8 `(rows, cols)`; levels int8 `(rows, blocks, form.places)`; scale bfloat16
        `(rows, blocks)`.
    """
    full, half = _blocks(cols)
    stride, size, count = form.stride(cols), form.record, UNIT_ROWS * form.record
    first, last = start // UNIT_ROWS, -(-stop // UNIT_ROWS)
    down, across = last - first, full + half
    strip = tiles[first * stride : last * stride].view(down, stride)
    body = strip[:, : full * form.unit()].reshape(down, full, form.unit())
    planes = body.new_zeros(down, across, _TILES, form.bits, _PLANE)
    records = body.new_empty(down, across, count)
    planes[:, :full] = body[..., :-count].reshape(down, full, _TILES, form.bits, _PLANE)
    records[:, :full] = body[..., -count:]
    if half:
        tail, few = strip[:, full * form.unit() :], form.planes(half=True)
        planes[:, full, :, :few] = tail[:, :-count].reshape(down, _TILES, few, _PLANE)
        records[:, full] = tail[:, -count:]
    codes = _codes(planes, form).view(8, down, across, _TILES, 4, 16).permute(1, 3, 4, 2, 0, 5)
    codes = codes.reshape(down * UNIT_ROWS, across * BLOCK)[: stop - start, :cols]
    records = records.view(down, across, UNIT_ROWS, size).transpose(1, 2)
    records = records.reshape(down * UNIT_ROWS, across, size)[: stop - start]
    levels = (records[..., :-2] ^ 128).view(torch.int8)
    scale = records[..., -2:].contiguous().view(torch.bfloat16).squeeze(-1)
    return codes, levels, scale


def _compressed(
    layout: Layout, codes: Tensor, levels: Tensor, scale: Tensor, flags: Tensor
) -> CompressedLinear:
    group = torch.arange(layout.groups, device=levels.device)
    blocks = group * layout.group_size // BLOCK  # the first of each group
    levels, scale = levels[:, blocks], scale[:, blocks[: layout.scales]].contiguous()
    counts = layout.level_counts()
    salient, salient_levels = None, None
    if layout.salient is not None:
        salient = flags[: layout.cols] != 0
        own = levels[..., _ORDINARY : _ORDINARY + counts[1]].contiguous()
        salient_levels = LevelTable(*layout.salient, own, scale)
    if salient is None and counts[0] > _FORMS[code_bits(layout)].alone:
        codes = codes.masked_fill(codes == 0, counts[0])
    table = LevelTable(*layout.levels, levels[..., : counts[0]].contiguous(), scale)
    return CompressedLinear(
        codes.contiguous(), table, layout.group_size, layout.nm, salient, salient_levels
    )
