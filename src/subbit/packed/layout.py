"""The table from which every size of a linear of codes and levels is computed.

A packed linear is a handful of tensors, its fields. All code fields are uint8 `(rows, bytes)`, a
stream a row:

- `mask` or `columns`: which weights are kept (`support.py`).
- the digits of the level index (code - 1) of every kept weight, in column order. The
  index is cut into the digits that its level kind names (`codes.LEVEL_KINDS`), the group label
  last and most significant. Ordinary and salient columns share the digit planes: plane k has the
  larger of both tables' k-th radix, and a plane of radix 1 is not stored. Plane 0 is called `sign`
  when its radix is 2; any other plane k is called `digit<k>`. With "pairs" of three groups and a
  salient "residual" of one, the planes are `sign` (radix 2) and `digit1` (radix 3): the group
  label, or in salient columns the second sign.
- `code`: in place of these planes where some codes are 0 though neither N:M nor whole columns say
  so: the code itself, one digit whose radix is the larger number of levels plus 1. Where single
  weights are salient too: the level index or code, or else the next number, one digit; that number
  marks a salient weight.
- `salient_codes`: uint8 `(salient weights,)`, where single weights are salient: their level
  indices, a byte each, row by row.

`codecs.py` says how digits of each radix become bytes. Then the level records:

- `levels`: float16 `(rows, groups of columns, F)`, the parameters of `codes.LevelTable` but for
  the last `LevelKind.integers`.
- `levels_zero`: these, `ceil(log2 L)` bits each, as one bit stream a row, uint8.
- `salient`: uint8 `(ceil(cols / 8),)`, a bit a column, column 0 the lowest bit of byte 0.
- `salient_levels`, `salient_levels_zero`: the same of the salient table.
- `column_scale`: float16 `(cols,)`, or `(S * cols,)` for factors of S parameters, one after the
  other.

With `int8` the levels themselves are stored in place of their parameters: `levels` and
`salient_levels` are int8 `(rows, groups of columns, L)`, from -127 to 127, there is no `..._zero`,
and `scale`, bfloat16 `(rows, groups of columns)`, or with `row_scale` `(rows, 1)`, multiplies both.

`sparse.py` has the table of 16-bit values under a mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from subbit.codes import LEVEL_KINDS
from subbit.packed.codecs import digit_row_bytes
from subbit.packed.fields import (
    FORMAT_VERSION,
    BaseLayout,
    Field,
    bad_value,
    check_int,
    is_int,
)
from subbit.packed.support import Support

__all__ = ["FORMAT_VERSION", "MAX_LEVELS", "Field", "Layout", "Plane", "Table"]

MAX_LEVELS = 255
"""A code is a uint8 and 0 means pruned."""


class Plane(NamedTuple):
    """One stored digit of the level index: field name, position k among the digits, radix."""

    name: str
    digit: int
    radix: int


@dataclass(frozen=True)
class Table:
    """A level table as it is stored.

    Attributes:
        name: of its field, "levels" or "salient_levels".
        kind, groups: see `codes.LevelTable`.
        records: column groups that have a record each.
        int8: whether the levels themselves are stored, int8, in place of their parameters.
    """

    name: str
    kind: str
    groups: int
    records: int
    int8: bool = False

    @property
    def count(self) -> int:
        """Number of levels L."""
        return self.groups * LEVEL_KINDS[self.kind].levels_per_group

    @property
    def integers(self) -> int:
        """How many parameters of a record are whole numbers below L."""
        return 0 if self.int8 else LEVEL_KINDS[self.kind].integers

    @property
    def floats(self) -> int:
        """How many numbers of a record are stored as they are."""
        if self.int8:
            return self.count
        return LEVEL_KINDS[self.kind].params(self.groups) - self.integers

    @property
    def dtype(self) -> torch.dtype:
        """Of these: float16 parameters or int8 levels."""
        return torch.int8 if self.int8 else torch.float16

    @property
    def integer_bits(self) -> int:
        """Bits of one whole number."""
        return (self.count - 1).bit_length()

    @property
    def record_bits(self) -> int:
        """Bits of one record, without the scale of int8 levels."""
        return 8 * self.dtype.itemsize * self.floats + self.integers * self.integer_bits

    def fields(self, rows: int) -> dict[str, Field]:
        """The stored tensors of the table."""
        table = {self.name: Field((rows, self.records, self.floats), self.dtype)}
        bits = self.records * self.integers * self.integer_bits
        if bits:
            table[f"{self.name}_zero"] = Field((rows, -(-bits // 8)), torch.uint8)
        return table


@dataclass(frozen=True)
class Layout(BaseLayout):
    """What must be known of a linear to tell the shape of each of its packed tensors.

    Attributes:
        rows, cols: shape of the dense weight.
        group_size: columns that share one level record (the last group may be shorter).
        nm: `(N, M)`, N kept of every M consecutive columns, or None.
        zeros: True if there is no N:M but some codes are 0.
        levels: `(kind, groups)` of the ordinary columns' level table.
        salient: `(kind, groups)` of the salient weights' level table, or None.
        salient_elements: number of salient weights where they are single ones; None where they are
            whole columns.
        salient_group_size: columns that share one salient record, None = `group_size`; only with
            `salient_elements`.
        kept_columns: number of columns that are not pruned, where whole columns are, or None.
        column_scale: True if every column has factors.
        scaled_params: number S of parameters that these multiply, 0 = one factor for all levels.
        int8: True if levels are int8 on one scale for each row and column group; not with
            `salient_group_size` or `scaled_params`.
        row_scale: True if that is one scale for all column groups, of which there are several.

    Raises:
        FormatError: a value that means nothing; the message names it.
    """

    rows: int
    cols: int
    group_size: int
    nm: tuple[int, int] | None
    zeros: bool
    levels: tuple[str, int]
    salient: tuple[str, int] | None
    salient_elements: int | None = None
    salient_group_size: int | None = None
    kept_columns: int | None = None
    column_scale: bool = False
    scaled_params: int = 0
    int8: bool = False
    row_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "group_size"):
            check_int(name, getattr(self, name))
        structured = self.support.nm is not None or self.kept_columns is not None
        if not isinstance(self.zeros, bool) or (self.zeros and structured):
            raise bad_value("zeros", self.zeros, "true or false, and false with N:M")
        if not isinstance(self.column_scale, bool):
            raise bad_value("column_scale", self.column_scale, "true or false")
        _check_levels("levels", self.levels)
        if self.salient is not None:
            _check_levels("salient", self.salient)
        check_int("scaled_params", self.scaled_params, 0, MAX_LEVELS)
        if self.scaled_params and (not self.column_scale or self.salient_elements is not None):
            raise bad_value("scaled_params", self.scaled_params, "0 without column scales")
        self._check_elements()
        apart = self.scaled_params or self.salient_group_size is not None
        if not isinstance(self.int8, bool) or (self.int8 and apart):
            wanted = "true or false, and false with scaled_params or salient_group_size"
            raise bad_value("int8", self.int8, wanted)
        several = self.int8 and self.groups > 1
        if not isinstance(self.row_scale, bool) or (self.row_scale and not several):
            raise bad_value("row_scale", self.row_scale, "true or false, and false without groups")

    def _check_elements(self) -> None:
        if self.salient_group_size is not None:
            check_int("salient_group_size", self.salient_group_size)
            if self.salient_elements is None:
                raise bad_value("salient_group_size", self.salient_group_size, "absent")
        if self.salient_elements is not None:
            check_int("salient_elements", self.salient_elements, 1, self.rows * self.cols)
            if self.salient is None or self.tables()[0].count == MAX_LEVELS:
                raise bad_value(
                    "salient_elements", self.salient_elements, f"with levels, below {MAX_LEVELS}"
                )

    @property
    def support(self) -> Support:
        """Which weights of a row are stored."""
        return Support(self.cols, self.nm, self.kept_columns)

    @property
    def groups(self) -> int:
        """Number of column groups that have a level record each."""
        return -(-self.cols // self.group_size)

    @property
    def scales(self) -> int:
        """Scales of a row's int8 levels."""
        return (1 if self.row_scale else self.groups) if self.int8 else 0

    @property
    def kept(self) -> int:
        """Weights of a row whose digits are stored, virtual columns included."""
        return self.support.width

    def tables(self) -> list[Table]:
        """The ordinary and, if there is one, the salient level table."""
        tables = [Table("levels", *self.levels, self.groups, self.int8)]
        if self.salient is not None:
            size = self.salient_group_size or self.group_size
            records = -(-self.cols // size)
            tables.append(Table("salient_levels", *self.salient, records, self.int8))
        return tables

    def level_counts(self) -> list[int]:
        """Number of levels L of each of `tables()`."""
        return [table.count for table in self.tables()]

    def radices(self) -> list[tuple[int, ...]]:
        """Radices of the digits of each table that they index, padded with 1 to one length."""
        counts = self.level_counts()
        if self.salient_elements is not None:
            return [(counts[0] + self.zeros + 1,)]
        if self.zeros:
            return [(count + 1,) for count in counts]
        own = [(*LEVEL_KINDS[table.kind].radices, table.groups) for table in self.tables()]
        longest = max(len(radices) for radices in own)
        return [radices + (1,) * (longest - len(radices)) for radices in own]

    def planes(self) -> list[Plane]:
        """The stored digit planes, least significant first."""
        shared = [max(column) for column in zip(*self.radices(), strict=True)]
        return [
            Plane(self._plane_name(k, radix), k, radix)
            for k, radix in enumerate(shared)
            if radix > 1
        ]

    def _plane_name(self, k: int, radix: int) -> str:
        if self.zeros or self.salient_elements is not None:
            return "code"
        return "sign" if k == 0 and radix == 2 else f"digit{k}"

    def fields(self) -> dict[str, Field]:
        """THE table: name -> shape and dtype of every stored tensor, in order."""
        table = self.support.fields(self.rows)
        for plane in self.planes():
            width = digit_row_bytes(self.kept, plane.radix)
            table[plane.name] = Field((self.rows, width), torch.uint8)
        levels, *salient = self.tables()
        table |= levels.fields(self.rows)
        if self.salient_elements is not None:
            table["salient_codes"] = Field((self.salient_elements,), torch.uint8)
        elif salient:
            table["salient"] = Field((-(-self.cols // 8),), torch.uint8)
        for extra in salient:
            table |= extra.fields(self.rows)
        if self.int8:
            table["scale"] = Field((self.rows, self.scales), torch.bfloat16)
        if self.column_scale:
            factors = self.cols * max(self.scaled_params, 1)
            table["column_scale"] = Field((factors,), torch.float16)
        return table


def _check_levels(name: str, levels: object) -> None:
    good = isinstance(levels, tuple) and len(levels) == 2 and isinstance(levels[0], str)
    if not good or levels[0] not in LEVEL_KINDS:
        raise bad_value(name, levels, f"(kind, groups) with kind one of {', '.join(LEVEL_KINDS)}")
    most = MAX_LEVELS // LEVEL_KINDS[levels[0]].levels_per_group
    if not is_int(levels[1]) or not 1 <= levels[1] <= most:
        raise bad_value(name, levels, f"(kind, groups) with 1 to {most} groups for {levels[0]!r}")
