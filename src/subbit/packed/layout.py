"""The table from which every size of a packed linear is computed.

A packed linear is a handful of tensors, its fields. All code fields are uint8 `(rows, bytes)`, a
stream a row:

- `mask`: N:M with N < M only. For every group of M columns the number of its pattern
  (`masks.py`), `ceil(log2 C(M, N))` bits each, as one bit stream a row.
- the digits of the level index (code - 1) of every kept weight, in column order: N weights a group
  with N:M (virtual columns of a padded last group included, with digits 0), else all columns. The
  index is cut into the digits that its level kind names (`codes.LEVEL_KINDS`), the group label
  last and most significant. Ordinary and salient columns share the digit planes: plane k has the
  larger of both tables' k-th radix, and a plane of radix 1 is not stored. Plane 0 is called `sign`
  when its radix is 2; any other plane k is called `digit<k>`. With "pairs" of three groups and a
  salient "residual" of one, the planes are `sign` (radix 2) and `digit1` (radix 3): the group
  label, or in salient columns the second sign.
- `code`: in place of these planes when there is no N:M but some codes are 0; the code itself, one
  digit whose radix is the larger number of levels plus 1.

`codecs.py` says how digits of each radix become bytes. Then the level records:

- `levels`: float16 `(rows, groups of columns, P)`, the parameters of `codes.LevelTable`.
- `salient`: uint8 `(ceil(cols / 8),)`, a bit a column, column 0 the lowest bit of byte 0.
- `salient_levels`: float16 `(rows, groups of columns, P of the salient table)`.

With `int8` the levels themselves are stored in place of float16 parameters: `levels` and
`salient_levels` are int8 `(rows, groups of columns, L)`, multiplied by `scale`, bfloat16
`(rows, groups of columns)`.
"""

from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, NamedTuple

import torch

from subbit.codes import LEVEL_KINDS
from subbit.errors import FormatError, nearest
from subbit.packed.codecs import digit_row_bytes
from subbit.packed.masks import MAX_M, mask_index_bits

__all__ = ["FORMAT_VERSION", "MAX_LEVELS", "Field", "Layout", "Plane"]

FORMAT_VERSION = 1
"""Version of the byte layout; a change of any byte changes it."""

MAX_LEVELS = 255
"""A code is a uint8 and 0 means pruned."""

_MAX_SIZE = 2**31 - 1


class Field(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Plane(NamedTuple):
    """One stored digit of the level index: field name, position k among the digits, radix."""

    name: str
    digit: int
    radix: int


@dataclass(frozen=True)
class Layout:
    """What must be known of a linear to tell the shape of each of its packed tensors.

    Attributes:
        rows, cols: shape of the dense weight.
        group_size: columns that share one level record (the last group may be shorter).
        nm: `(N, M)`, N kept of every M consecutive columns, or None.
        zeros: True if there is no N:M but some codes are 0.
        levels: `(kind, groups)` of the ordinary columns' level table.
        salient: `(kind, groups)` of the salient columns' level table, or None.
        int8: True if levels are int8 on one scale for each row and column group.

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
    int8: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "group_size"):
            _check_size(name, getattr(self, name))
        if self.nm is not None:
            _check_nm(self.nm)
        if not isinstance(self.zeros, bool) or (self.zeros and self.nm is not None):
            raise _bad("zeros", self.zeros, "true or false, and false with N:M")
        _check_levels("levels", self.levels)
        if self.salient is not None:
            _check_levels("salient", self.salient)
        if not isinstance(self.int8, bool):
            raise _bad("int8", self.int8, "true or false")

    @property
    def groups(self) -> int:
        """Number of column groups that have a level record each."""
        return -(-self.cols // self.group_size)

    @property
    def kept(self) -> int:
        """Weights of a row whose digits are stored, virtual columns included."""
        if self.nm is None:
            return self.cols
        n, m = self.nm
        return n * -(-self.cols // m)

    def tables(self) -> list[tuple[str, int]]:
        """`(kind, groups)` of the ordinary and, if there is one, the salient level table."""
        return [self.levels] if self.salient is None else [self.levels, self.salient]

    def level_counts(self) -> list[int]:
        """Number of levels L of each of `tables()`."""
        return [groups * LEVEL_KINDS[kind].levels_per_group for kind, groups in self.tables()]

    def radices(self) -> list[tuple[int, ...]]:
        """Radices of the digits of each of `tables()`, padded with 1 to one length."""
        if self.zeros:
            return [(count + 1,) for count in self.level_counts()]
        own = [(*LEVEL_KINDS[kind].radices, groups) for kind, groups in self.tables()]
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
        if self.zeros:
            return "code"
        return "sign" if k == 0 and radix == 2 else f"digit{k}"

    def fields(self) -> dict[str, Field]:
        """THE table: name -> shape and dtype of every stored tensor, in order."""
        table: dict[str, Field] = {}
        if self.nm is not None and self.nm[0] < self.nm[1]:
            bits = mask_index_bits(*self.nm) * -(-self.cols // self.nm[1])
            table["mask"] = Field((self.rows, -(-bits // 8)), torch.uint8)
        for plane in self.planes():
            width = digit_row_bytes(self.kept, plane.radix)
            table[plane.name] = Field((self.rows, width), torch.uint8)
        table["levels"] = self._level_field(*self.levels)
        if self.salient is not None:
            table["salient"] = Field((-(-self.cols // 8),), torch.uint8)
            table["salient_levels"] = self._level_field(*self.salient)
        if self.int8:
            table["scale"] = Field((self.rows, self.groups), torch.bfloat16)
        return table

    def _level_field(self, kind: str, groups: int) -> Field:
        stored = LEVEL_KINDS[kind]
        width = groups * (stored.levels_per_group if self.int8 else stored.params_per_group)
        dtype = torch.int8 if self.int8 else torch.float16
        return Field((self.rows, self.groups, width), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.nbytes for field in self.fields().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense shape."""
        return 8 * self.nbytes / (self.rows * self.cols)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `int8` is named only where it is true."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name != "int8" or value
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layout":
        """Undo `to_dict`.

        Raises:
            FormatError: an unknown or missing key, or a value that means nothing.
        """
        if not isinstance(data, dict):
            raise _bad("itself", data, "an object")
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise FormatError(
                    f"packed layout has an unknown key {key!r}{nearest(str(key), known)}: "
                    "the file is damaged or newer than this program."
                )
        for key in known:
            if key not in data and key != "int8":
                raise FormatError(
                    f"packed layout lacks the key {key!r}: the file is damaged; fetch it again."
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _bad(name: str, value: object, wanted: str) -> FormatError:
    return FormatError(
        f"packed layout: {name} is {value!r:.80} but must be {wanted}; "
        "the file is damaged or newer than this program."
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: object) -> None:
    if not _is_int(value) or not 1 <= value <= _MAX_SIZE:
        raise _bad(name, value, f"an integer from 1 to {_MAX_SIZE}")


def _check_nm(nm: object) -> None:
    good = isinstance(nm, tuple) and len(nm) == 2 and all(_is_int(value) for value in nm)
    if not good or not 1 <= nm[0] <= nm[1] <= MAX_M:
        raise _bad("nm", nm, f"(N, M) with 1 <= N <= M <= {MAX_M}")


def _check_levels(name: str, levels: object) -> None:
    good = isinstance(levels, tuple) and len(levels) == 2 and isinstance(levels[0], str)
    if not good or levels[0] not in LEVEL_KINDS:
        raise _bad(name, levels, f"(kind, groups) with kind one of {', '.join(LEVEL_KINDS)}")
    most = MAX_LEVELS // LEVEL_KINDS[levels[0]].levels_per_group
    if not _is_int(levels[1]) or not 1 <= levels[1] <= most:
        raise _bad(name, levels, f"(kind, groups) with 1 to {most} groups for {levels[0]!r}")
