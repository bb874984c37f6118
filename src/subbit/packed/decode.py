"""From packed bytes to codes, trusting nothing: any bytes give a valid linear or a FormatError."""

from collections.abc import Mapping
from math import comb, prod

import torch
from torch import Tensor

from subbit.errors import FormatError
from subbit.packed.codecs import unpack_bits, unpack_digits
from subbit.packed.layout import Layout, Plane
from subbit.packed.masks import index_to_mask, mask_index_bits, tail_columns

__all__ = ["check_tensors", "decode_codes", "decode_salient", "limits"]


def _damaged(name: str, what: str) -> FormatError:
    return FormatError(
        f"packed field '{name}' {what}; the file is damaged: fetch or pack it again."
    )


def check_tensors(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Check names, shapes and dtypes against `layout.fields()`, and that levels are finite.

    Raises:
        FormatError: naming the first field at fault.
    """
    table = layout.fields()
    for name in tensors:
        if name not in table:
            raise _damaged(name, f"is not part of this layout ({', '.join(table)})")
    for name, field in table.items():
        if name not in tensors:
            raise _damaged(name, "is missing")
        tensor = tensors[name]
        if tuple(tensor.shape) != field.shape or tensor.dtype != field.dtype:
            raise _damaged(
                name,
                f"is {tensor.dtype} {tuple(tensor.shape)} but must be {field.dtype} {field.shape}",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _damaged(name, "holds a value that is not finite")


def decode_salient(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The salient columns, bool `(cols,)`, or None."""
    if layout.salient is None:
        return None
    return unpack_bits(tensors["salient"][None], 1, layout.cols)[0].bool()


def decode_codes(layout: Layout, tensors: Mapping[str, Tensor], salient: Tensor | None) -> Tensor:
    """Decode the codes of all rows of `layout` at once: uint8 `(rows, cols)`.

    Raises:
        FormatError: a mask number, digit or level index out of range; names the field.
    """
    mask = _decode_mask(layout, tensors)
    digits = _decode_digits(layout, tensors)
    radices, device = layout.radices(), tensors["levels"].device
    last = max((plane.digit for plane, _ in digits), default=0)
    if salient is None or radices[0][:last] == radices[1][:last]:
        # both tables weigh the digits alike: one pass, then a limit for each column
        shared = tuple(max(column) for column in zip(*radices, strict=True))
        codes = _place(layout, _compose(layout, digits, shared, device), mask)
        good = salient is None or not (codes.amax(0) > limits(layout, salient)).any()
    else:
        codes, special = (
            _place(layout, _compose(layout, digits, own, device), mask) for own in radices
        )
        codes = torch.where(salient, special, codes)
        good = codes.count_nonzero() == layout.rows * _kept_columns(layout)
    if not good:
        name = digits[-1][0].name
        raise _damaged(name, "holds a level index beyond the levels of its column")
    return codes


def limits(layout: Layout, salient: Tensor) -> Tensor:
    """Largest code of each column, uint8 `(cols,)`; `salient` is bool `(cols,)`."""
    counts = layout.level_counts()
    highest = torch.full_like(salient, counts[0], dtype=torch.uint8)
    return highest.masked_fill_(salient, counts[-1])


def _kept_columns(layout: Layout) -> int:
    """Real columns that a row keeps."""
    if layout.nm is None:
        return layout.cols
    n, m = layout.nm
    return layout.cols // m * n + min(n, layout.cols % m)


def _decode_mask(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Mask of whole M-groups, bool `(rows, G * M)`; None where every column is kept."""
    if "mask" not in tensors:
        return None
    n, m = layout.nm
    index = unpack_bits(tensors["mask"], mask_index_bits(n, m), -(-layout.cols // m))
    if index.amax() >= comb(m, n):
        raise _damaged("mask", f"holds a number beyond the {comb(m, n)} patterns of {n}:{m}")
    mask = index_to_mask(index, n, m).flatten(1)
    virtual, marked = tail_columns(layout.cols, n, m)
    if virtual:
        edge = layout.cols + marked
        if not mask[:, layout.cols : edge].all() or mask[:, edge:].any():
            raise _damaged("mask", f"keeps columns beyond the last of {layout.cols}")
    return mask


def _decode_digits(layout: Layout, tensors: Mapping[str, Tensor]) -> list[tuple[Plane, Tensor]]:
    """The stored digits, uint8 `(rows, kept)`, every digit below its plane's radix."""
    found = []
    for plane in layout.planes():
        digits, good = unpack_digits(tensors[plane.name], plane.radix, layout.kept)
        if not good:
            raise _damaged(plane.name, f"holds bytes that are no digits of radix {plane.radix}")
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


def _place(layout: Layout, kept: Tensor, mask: Tensor | None) -> Tensor:
    """Put the codes of the kept weights into their columns: uint8 `(rows, cols)`."""
    if mask is None:
        return kept[:, : layout.cols]
    codes = torch.zeros_like(mask, dtype=torch.uint8).masked_scatter_(mask, kept)
    return codes[:, : layout.cols]
