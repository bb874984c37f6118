"""Which weights of a row are stored: all, N of every M, or those of some columns.

- N:M with N < M: field `mask`. For every group of M columns the number of its pattern
  (`masks.py`), `ceil(log2 C(M, N))` bits each, as one bit stream a row. The columns of a padded
  last group beyond the matrix are virtual; those that its pattern keeps are stored too, as zeros.
- whole columns pruned: field `columns`, a bit a column, column 0 the lowest bit of byte 0.
- else nothing: every weight is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, lgamma, log, log2

import torch
from torch import Tensor

from subbit.errors import FormatError
from subbit.packed.codecs import pack_bits, unpack_bits
from subbit.packed.fields import Field, bad_value, check_int, is_int
from subbit.packed.masks import MAX_M, index_to_mask, mask_index_bits, mask_to_index, tail_columns

__all__ = ["Support", "column_bits", "damaged", "log2_choices", "unpack_columns"]


def damaged(name: str, what: str) -> FormatError:
    """The refusal of a stored tensor."""
    return FormatError(
        f"packed field '{name}' {what}; the file is damaged: fetch or pack it again."
    )


def log2_choices(count: int, chosen: int) -> float:
    """`log2 C(count, chosen)`."""
    return (lgamma(count + 1) - lgamma(chosen + 1) - lgamma(count - chosen + 1)) / log(2)


def column_bits(flags: Tensor) -> Tensor:
    """Bool `(cols,)` as bytes, uint8 `(ceil(cols / 8),)`."""
    return pack_bits(flags[None], 1)[0]


def unpack_columns(data: Tensor, cols: int) -> Tensor:
    """Undo `column_bits`: bool `(cols,)`."""
    return unpack_bits(data[None], 1, cols)[0].bool()


@dataclass(frozen=True)
class Support:
    """Which weights of a row are stored.

    Attributes:
        cols: columns of the dense weight.
        nm: `(N, M)`, N kept of every M consecutive columns, or None.
        kept_columns: number of columns that are not pruned, or None; not with N:M.

    Raises:
        FormatError: a value that means nothing; the message names it.
    """

    cols: int
    nm: tuple[int, int] | None = None
    kept_columns: int | None = None

    def __post_init__(self) -> None:
        nm = self.nm
        if nm is not None:
            good = isinstance(nm, tuple) and len(nm) == 2 and all(is_int(value) for value in nm)
            if not good or not 1 <= nm[0] <= nm[1] <= MAX_M:
                raise bad_value("nm", nm, f"(N, M) with 1 <= N <= M <= {MAX_M}")
        if self.kept_columns is not None:
            check_int("kept_columns", self.kept_columns, 1, self.cols)
            if nm is not None:
                raise bad_value("kept_columns", self.kept_columns, "absent with N:M")

    @property
    def width(self) -> int:
        """Weights of a row that are stored, virtual columns included."""
        if self.nm is not None:
            return self.nm[0] * -(-self.cols // self.nm[1])
        return self.cols if self.kept_columns is None else self.kept_columns

    @property
    def real(self) -> int:
        """Weights of a row that are kept."""
        if self.nm is None:
            return self.width
        n, m = self.nm
        return self.cols // m * n + min(n, self.cols % m)

    @property
    def share(self) -> float:
        """Share of kept weights as papers count it: N / M, or that of the columns."""
        return self.nm[0] / self.nm[1] if self.nm is not None else self.width / self.cols

    def floor(self, rows: int) -> float:
        """Bits per weight that it takes at least to tell which weights are kept."""
        if self.nm is not None:
            n, m = self.nm
            full, rest = divmod(self.cols, m)
            return (full * log2(comb(m, n)) + log2(comb(rest, min(n, rest)))) / self.cols
        return log2_choices(self.cols, self.width) / (rows * self.cols)

    def fields(self, rows: int) -> dict[str, Field]:
        """What is stored to tell which weights these are."""
        if self.nm is not None and self.nm[0] < self.nm[1]:
            bits = mask_index_bits(*self.nm) * -(-self.cols // self.nm[1])
            return {"mask": Field((rows, -(-bits // 8)), torch.uint8)}
        if self.kept_columns is not None:
            return {"columns": Field((-(-self.cols // 8),), torch.uint8)}
        return {}

    def check(self, kept: Tensor, first: int = 0) -> Tensor:
        """Check a mask and extend it over the virtual columns.

        Args:
            kept: bool `(rows, cols)`.
            first: number of its first row, for the message.

        Returns:
            bool `(rows, cols + virtual)`, `width` ones in every row.

        Raises:
            ValueError: the mask breaks N:M, or prunes more or less than whole columns.
        """
        if self.nm is not None:
            return self._check_nm(kept, first)
        if self.kept_columns is not None:
            bad = kept != kept[:1]
            if bad.any():
                row, col = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"structured pruning: row {first + row} differs from row {first} in column "
                    f"{col}; whole columns must be pruned."
                )
        return kept

    def _check_nm(self, kept: Tensor, first: int) -> Tensor:
        n, m = self.nm
        virtual, marked = tail_columns(self.cols, n, m)
        kept = torch.nn.functional.pad(kept, (0, virtual))
        kept[:, self.cols : self.cols + marked] = True
        groups = kept.view(len(kept), -1, m)
        bad = groups.sum(-1, dtype=torch.uint8) != n
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            stop = min((group + 1) * m, self.cols)
            found = int(groups[row, group, : stop - group * m].sum())
            raise ValueError(
                f"codes break {n}:{m}: row {first + row} keeps {found} of columns "
                f"{group * m}..{stop - 1} instead of {min(n, stop - group * m)}."
            )
        return kept

    def pack(self, kept: Tensor) -> dict[str, Tensor]:
        """The fields a row that tell which weights are kept; `kept` as `check` returns it."""
        if self.nm is None or self.nm[0] == self.nm[1]:
            return {}
        groups = kept.view(len(kept), -1, self.nm[1])
        index = mask_to_index(groups, self.nm[0])
        return {"mask": pack_bits(index, mask_index_bits(*self.nm))}

    def take(self, matrix: Tensor, kept: Tensor) -> Tensor:
        """The stored entries of `(rows, cols)`, zeros in virtual columns: `(rows, width)`."""
        if self.width == kept.shape[1] == matrix.shape[1]:
            return matrix
        padded = torch.nn.functional.pad(matrix, (0, kept.shape[1] - matrix.shape[1]))
        return padded[kept].view(len(matrix), self.width)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Which weights are kept, as `check` returns it; None where all columns are.

        Raises:
            FormatError: bytes that are no such mask.
        """
        if "columns" in tensors:
            columns = unpack_columns(tensors["columns"], self.cols)
            if int(columns.sum()) != self.kept_columns:
                raise damaged("columns", f"does not keep {self.kept_columns} columns")
            return columns
        if "mask" not in tensors:
            return None
        n, m = self.nm
        index = unpack_bits(tensors["mask"], mask_index_bits(n, m), -(-self.cols // m))
        if index.amax() >= comb(m, n):
            raise damaged("mask", f"holds a number beyond the {comb(m, n)} patterns of {n}:{m}")
        mask = index_to_mask(index, n, m).flatten(1)
        virtual, marked = tail_columns(self.cols, n, m)
        if virtual:
            edge = self.cols + marked
            if not mask[:, self.cols : edge].all() or mask[:, edge:].any():
                raise damaged("mask", f"keeps columns beyond the last of {self.cols}")
        return mask

    def place(self, stored: Tensor, kept: Tensor | None) -> Tensor:
        """Undo `take`: stored entries in their columns, 0 elsewhere, `(rows, cols)`."""
        if kept is None:
            return stored[:, : self.cols]
        kept = kept.expand(len(stored), -1)
        dense = torch.zeros(kept.shape, dtype=stored.dtype, device=stored.device)
        return dense.masked_scatter_(kept, stored)[:, : self.cols]
