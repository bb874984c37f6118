"""From packed bytes to codes, trusting nothing: any bytes give a valid linear or a FormatError."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from subbit.codes import LevelTable
from subbit.packed.codecs import join, unpack_bits, unpack_digits
from subbit.packed.fields import BaseLayout
from subbit.packed.layout import Layout, Plane, Table
from subbit.packed.support import damaged, unpack_columns

__all__ = ["check_tensors", "decode_codes", "decode_elements", "decode_salient", "limits"]


def check_tensors(layout: BaseLayout, tensors: Mapping[str, Tensor]) -> None:
    """Check names, shapes and dtypes against `layout.fields()`, and that levels are numbers.

    That is, that floats are finite and no int8 level is -128, with which a kernel's sums overflow.

    Raises:
        FormatError: naming the first field at fault.
    """
    table = layout.fields()
    for name in tensors:
        if name not in table:
            raise damaged(name, f"is not part of this layout ({', '.join(table)})")
    for name, field in table.items():
        if name not in tensors:
            raise damaged(name, "is missing")
        tensor = tensors[name]
        if tuple(tensor.shape) != field.shape or tensor.dtype != field.dtype:
            raise damaged(
                name,
                f"is {tensor.dtype} {tuple(tensor.shape)} but must be {field.dtype} {field.shape}",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise damaged(name, "holds a value that is not finite")
        if tensor.dtype == torch.int8 and (tensor == -128).any():
            raise damaged(name, "holds the level -128; they go from -127 to 127")


def decode_salient(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The salient columns, bool `(cols,)`, or None."""
    return unpack_columns(tensors["salient"], layout.cols) if "salient" in tensors else None


def decode_levels(table: Table, tensors: Mapping[str, Tensor]) -> LevelTable:
    """A level table; it shares memory with its tensor unless it has whole numbers.

    Raises:
        FormatError: a whole number beyond the levels.
    """
    params = tensors[table.name]
    name = f"{table.name}_zero"
    if table.integers and table.integer_bits:
        count = table.records * table.integers
        integers = unpack_bits(tensors[name], table.integer_bits, count)
        if integers.amax() >= table.count:
            raise damaged(name, f"holds a number beyond the {table.count} levels")
        integers = integers.view(len(params), table.records, table.integers)
        params = join((params, integers.to(params.dtype)), -1)
    elif table.integers:  # one level: its number can only be 0
        params = torch.nn.functional.pad(params, (0, table.integers))
    return LevelTable(table.kind, table.groups, params, tensors.get("scale"))


def decode_codes(layout: Layout, tensors: Mapping[str, Tensor], salient: Tensor | None) -> Tensor:
    """Decode the codes of all rows of `layout` at once: uint8 `(rows, cols)`.

    Where single weights are salient theirs is one more than the number of ordinary levels.

    Args:
        salient: the salient columns, bool `(cols,)`, or None.

    Raises:
        FormatError: a mask number, digit or level index out of range; names the field.
    """
    support = layout.support
    mask = support.unpack(tensors)
    digits = _decode_digits(layout, tensors)
    radices, device = layout.radices(), tensors["levels"].device
    last = max((plane.digit for plane, _ in digits), default=0)
    if salient is None or radices[0][:last] == radices[1][:last]:
        # both tables weigh the digits alike: one pass, then a limit for each column
        shared = tuple(max(column) for column in zip(*radices, strict=True))
        codes = support.place(_compose(layout, digits, shared, device), mask)
        good = salient is None or not (codes.amax(0) > limits(layout, salient)).any()
    else:
        codes, special = (
            support.place(_compose(layout, digits, own, device), mask) for own in radices
        )
        codes = torch.where(salient, special, codes)
        good = codes.count_nonzero() == layout.rows * support.real
    if not good:
        name = digits[-1][0].name
        raise damaged(name, "holds a level index beyond the levels of its column")
    return codes


def decode_elements(layout: Layout, codes: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Put the codes of single salient weights in their places.

    Args:
        codes: uint8 `(rows, cols)` of `decode_codes`.
        stored: the level indices from these rows on, uint8 `(any,)`.

    Returns:
        The codes, and which weights are salient, bool `(rows, cols)`.

    Raises:
        FormatError: fewer stored than there are salient weights, or one beyond the levels.
    """
    ordinary, special = layout.level_counts()
    salient = codes == ordinary + 1
    count = int(salient.sum())
    if count > len(stored):
        raise damaged("code", f"marks more than {layout.salient_elements} weights as salient")
    own = stored[:count]
    if count and own.amax() >= special:
        raise damaged("salient_codes", f"holds a number beyond the {special} levels")
    return codes.masked_scatter_(salient, own + 1), salient


def limits(layout: Layout, salient: Tensor) -> Tensor:
    """Largest code of each weight, uint8 of the shape of `salient`, bool."""
    counts = layout.level_counts()
    highest = torch.full_like(salient, counts[0], dtype=torch.uint8)
    return highest.masked_fill_(salient, counts[-1])


def _decode_digits(layout: Layout, tensors: Mapping[str, Tensor]) -> list[tuple[Plane, Tensor]]:
    """The stored digits, uint8 `(rows, kept)`, every digit below its plane's radix."""
    found = []
    for plane in layout.planes():
        digits, good = unpack_digits(tensors[plane.name], plane.radix, layout.kept)
        if not good:
            raise damaged(plane.name, f"holds bytes that are no digits of radix {plane.radix}")
        found.append((plane, digits))
    return found


def _compose(
    layout: Layout,
    digits: list[tuple[Plane, Tensor]],
    radices: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Codes from digits, uint8 `(rows, kept)`; 0 where a digit is not below its own radix."""
    codes = torch.full(
        (layout.rows, layout.kept), int(not layout.zeros), dtype=torch.uint8, device=device
    )
    for plane, digit in digits:
        codes.add_(digit, alpha=prod(radices[: plane.digit]))
    for plane, digit in digits:
        if radices[plane.digit] < plane.radix:
            codes.masked_fill_(digit >= radices[plane.digit], 0)
    return codes
