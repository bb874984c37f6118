"""16-bit values under a mask: their layout, packing, and reading back.

Fields: those of the support (`support.py`) and `values`, float16 or bfloat16 `(rows, kept)`, zeros
in virtual columns. Without N:M or whole pruned columns: `bitmap`, uint8 `(rows, ceil(cols / 8))`, a
bit a weight, 1 = kept, and `values` `(kept weights,)`, row by row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.codes import SparseLinear
from subbit.errors import FormatError
from subbit.packed.codecs import pack_bits, unpack_bits
from subbit.packed.fields import BaseLayout, Field, bad_value, check_int
from subbit.packed.support import Support, column_bits, damaged

__all__ = ["DTYPES", "SparseLayout", "pack_sparse", "unpack_sparse_rows"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SparseLayout(BaseLayout):
    """What must be known of a pruned linear to tell the shape of each of its packed tensors.

    Exactly one of `nm`, `kept_columns` and `elements` is given.

    Attributes:
        rows, cols: shape of the dense weight.
        values: "float16" or "bfloat16", of the kept weights.
        nm: `(N, M)`, N kept of every M consecutive columns, or None.
        kept_columns: number of columns that are not pruned, or None.
        elements: number of weights that are not pruned, or None.

    Raises:
        FormatError: a value that means nothing; the message names it.
    """

    rows: int
    cols: int
    values: str
    nm: tuple[int, int] | None = None
    kept_columns: int | None = None
    elements: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            check_int(name, getattr(self, name))
        if not isinstance(self.values, str) or self.values not in DTYPES:
            raise bad_value("values", self.values, f"one of {', '.join(DTYPES)}")
        single = self.support.nm is None and self.kept_columns is None
        if single != (self.elements is not None):
            raise bad_value("elements", self.elements, "given without nm and kept_columns, only so")
        if self.elements is not None:
            check_int("elements", self.elements, 1, self.rows * self.cols)

    @property
    def support(self) -> Support:
        """Which weights of a row are stored, if that is the same number in every row."""
        return Support(self.cols, self.nm, self.kept_columns)

    def fields(self) -> dict[str, Field]:
        """THE table: name -> shape and dtype of every stored tensor, in order."""
        dtype = DTYPES[self.values]
        if self.elements is None:
            values = Field((self.rows, self.support.width), dtype)
            return {**self.support.fields(self.rows), "values": values}
        bitmap = Field((self.rows, -(-self.cols // 8)), torch.uint8)
        return {"bitmap": bitmap, "values": Field((self.elements,), dtype)}


def pack_sparse(linear: SparseLinear) -> tuple[SparseLayout, dict[str, Tensor]]:
    """Pack one pruned linear; see `pack.pack`."""
    values, mask = linear.values, linear.mask
    names = {dtype: name for name, dtype in DTYPES.items()}
    if values.dtype not in names or values.dim() != 2 or values.numel() == 0:
        raise ValueError(
            "values must be a non-empty float16 or bfloat16 matrix, "
            f"not {values.dtype} {tuple(values.shape)}."
        )
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(
            f"mask must be bool {tuple(values.shape)}, not {mask.dtype} {tuple(mask.shape)}."
        )
    _check_values(values, mask)
    columns = int(mask[0].sum()) if linear.structured else None
    nm = None if linear.nm is None else tuple(linear.nm)
    elements = int(mask.sum()) if nm is None and columns is None else None
    layout = SparseLayout(*values.shape, names[values.dtype], nm, columns, elements)
    if elements is not None:
        return layout, {"bitmap": pack_bits(mask, 1), "values": values[mask]}
    support = layout.support
    kept = support.check(mask)
    tensors = support.pack(kept)
    if columns is not None:
        tensors["columns"] = column_bits(mask[0])
    return layout, {**tensors, "values": support.take(values, kept).contiguous()}


def _check_values(values: Tensor, mask: Tensor) -> None:
    for bad, what in (
        (~values.isfinite(), f"is not finite in {values.dtype}".replace("torch.", "")),
        ((values != 0) & ~mask, "is pruned by the mask but not 0"),
    ):
        if bad.any():
            row, col = bad.nonzero()[0].tolist()
            message = f"values: row {row}, column {col} {what}"
            if "finite" in what:
                raise FormatError(f"{message}; the weights are too large or damaged.")
            raise ValueError(f"{message}.")


def unpack_sparse_rows(
    layout: SparseLayout, tensors: Mapping[str, Tensor], chunks: Iterator[tuple[int, int]]
) -> Iterator[SparseLinear]:
    """Read consecutive ranges of rows, from row 0 on.

    Raises:
        FormatError: bytes that mean no valid linear; the message names the field.
    """
    taken = 0
    for start, stop in chunks:
        part = {name: t[start:stop] if t.dim() > 1 else t for name, t in tensors.items()}
        if layout.elements is None:
            support = layout.support
            kept = support.unpack(part)
            values = support.place(part["values"], kept)
            mask = torch.ones_like(values, dtype=torch.bool)
            if kept is not None:
                mask = kept.expand(stop - start, -1)[:, : layout.cols].contiguous()
        else:
            mask = unpack_bits(part["bitmap"], 1, layout.cols).bool()
            count = int(mask.sum())
            if taken + count > layout.elements:
                raise damaged("bitmap", f"keeps more than {layout.elements} weights")
            stored = part["values"][taken : taken + count]
            values = torch.zeros(mask.shape, dtype=stored.dtype, device=mask.device)
            values.masked_scatter_(mask, stored)
            taken += count
        structured = layout.kept_columns is not None
        yield SparseLinear(values, mask, layout.nm, structured)
    if layout.elements is not None and taken != layout.elements:
        raise damaged("bitmap", f"keeps {taken} weights instead of {layout.elements}")
