"""Streams of small numbers as bytes: vectorised torch, on whatever device the tensors are on.

Every row of a matrix is a stream of its own, so a range of rows is a slice of the bytes. A row is
padded with zeros to whole bytes. Byte layouts, by the radix r of the digits:

- r a power of two: log2(r) bits a digit, digit 0 in the lowest bits of byte 0, and so on up.
- r = 3: five digits a byte, `d0 + 3*d1 + 9*d2 + 27*d3 + 81*d4` (1.6 bits a digit).
- any other r: as many digits as fit a little-endian 32-bit word, the first digit lowest; the last
  word of a row keeps only the bytes that its digits can reach.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "digit_row_bytes",
    "join",
    "pack_bits",
    "pack_digits",
    "select_rows",
    "unpack_bits",
    "unpack_digits",
]

_WORD_BITS = 32
_TABLE_LIMIT = 1 << 16  # entries of the tables that split part of a word into its digits
_LANES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _is_power_of_two(radix: int) -> bool:
    return radix & (radix - 1) == 0


def _digits_per_word(radix: int) -> int:
    if radix == 3:
        return 5
    digits = 1
    while radix ** (digits + 1) <= 1 << _WORD_BITS:
        digits += 1
    return digits


def _word_bytes(radix: int, digits: int) -> int:
    return ((radix**digits - 1).bit_length() + 7) // 8


def digit_row_bytes(count: int, radix: int) -> int:
    """Bytes of a row of `count` digits of `radix` (2..256)."""
    if _is_power_of_two(radix):
        return (count * (radix.bit_length() - 1) + 7) // 8
    per_word = _digits_per_word(radix)
    words, rest = divmod(count, per_word)
    return words * _word_bytes(radix, per_word) + _word_bytes(radix, rest)


def join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` of tensors of one dtype, under autocast too, where it refuses 16-bit floats."""
    dtype = parts[0].dtype
    if dtype.is_floating_point and dtype.itemsize == 2:
        return torch.cat([part.view(torch.int16) for part in parts], dim).view(dtype)
    return torch.cat(list(parts), dim)


def select_rows(table: Tensor, index: Tensor) -> Tensor:
    """Look up `table[index]` for a uint8 table `(entries, width)`: uint8 `(*index.shape, width)`.

    A row of up to eight bytes travels as one integer, several times faster than byte by byte.
    """
    width = table.shape[1]
    lane = next((size for size in _LANES if size >= width), 8)
    padded = torch.nn.functional.pad(table, (0, -width % lane)).contiguous()
    flat = index.reshape(-1)
    flat = flat if flat.dtype == torch.int64 else flat.int()
    lanes = padded.view(_LANES[lane])
    lanes = lanes.squeeze(1) if lanes.shape[1] == 1 else lanes
    found = lanes.index_select(0, flat).view(torch.uint8)
    return found.view(*index.shape, padded.shape[1])[..., :width]


def _digit_table(radix: int, digits: int, device: torch.device) -> Tensor:
    """Digits of every number below `radix**digits`, uint8 `(radix**digits, digits)`."""
    numbers = torch.arange(radix**digits, dtype=torch.int32, device=device)
    # one after the other: torch.compile divides by the empty lanes of a vector of powers
    found = [numbers // radix**digit % radix for digit in range(digits)]
    return torch.stack(found, -1).to(torch.uint8)


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Pack integers below `2**width` (`width` 1..16) into a little-endian bit stream a row.

    Args:
        values: integer `(rows, count)`.

    Returns:
        uint8 `(rows, ceil(count * width / 8))`.
    """
    rows, count = values.shape
    # eight values fill `width` bytes exactly
    padded = torch.nn.functional.pad(values.int(), (0, -count % 8)).view(rows, -1, 8)
    out = values.new_zeros(rows, padded.shape[1], width, dtype=torch.uint8)
    for j in range(8):
        byte, shift = divmod(j * width, 8)
        shifted = padded[..., j] << shift
        for k in range(byte, (j * width + width + 7) // 8):
            out[..., k] |= (shifted >> (8 * (k - byte)) & 255).to(torch.uint8)
    return out.view(rows, -1)[:, : (count * width + 7) // 8].contiguous()


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """Undo `pack_bits`: integer `(rows, count)`, uint8 for widths 1, 2, 4 and 8, else int32."""
    rows = data.shape[0]
    if width == 8:
        return data
    if 8 % width == 0:
        table = _digit_table(1 << width, 8 // width, data.device)
        return select_rows(table, data).reshape(rows, -1)[:, :count]
    groups = -(-count // 8)
    padded = torch.nn.functional.pad(data, (0, groups * width - data.shape[1]))
    source = padded.view(rows, groups, width)
    out = torch.empty(rows, groups, 8, dtype=torch.int32, device=data.device)
    for j in range(8):
        byte, shift = divmod(j * width, 8)
        value = source[..., byte].int() >> shift
        for k in range(byte + 1, (j * width + width + 7) // 8):
            value |= source[..., k].int() << (8 * (k - byte) - shift)
        out[..., j] = value & ((1 << width) - 1)
    return out.view(rows, -1)[:, :count]


def pack_digits(digits: Tensor, radix: int) -> Tensor:
    """Pack digits below `radix` (2..256): uint8 `(rows, digit_row_bytes(count, radix))`.

    Args:
        digits: uint8 `(rows, count)`.
    """
    rows, count = digits.shape
    if _is_power_of_two(radix):
        return pack_bits(digits, radix.bit_length() - 1)
    per_word = _digits_per_word(radix)
    size = _word_bytes(radix, per_word)
    padded = torch.nn.functional.pad(digits, (0, -count % per_word)).view(rows, -1, per_word)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=digits.device)
    for j in reversed(range(per_word)):
        words.mul_(radix).add_(padded[..., j])
    out = torch.stack([words >> (8 * i) & 255 for i in range(size)], -1).to(torch.uint8)
    return out.view(rows, -1)[:, : digit_row_bytes(count, radix)].contiguous()


def _words(data: Tensor, size: int) -> Tensor:
    """The little-endian words of `size` bytes of each row: int64 `(rows, words)`."""
    if size == 1:
        return data
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % size))
    padded = padded.view(data.shape[0], -1, size)
    words = padded[..., 0].long()
    for i in range(1, size):
        words |= padded[..., i].long() << (8 * i)
    return words


def unpack_digits(data: Tensor, radix: int, count: int) -> tuple[Tensor, Tensor]:
    """Undo `pack_digits`.

    Returns:
        The digits, uint8 `(rows, count)`, each below `radix` whatever the bytes, and a bool scalar
        tensor: True if every word is one that `pack_digits` could have written.
    """
    if _is_power_of_two(radix):
        good = torch.ones((), dtype=torch.bool, device=data.device)
        return unpack_bits(data, radix.bit_length() - 1, count), good
    rows, per_word = data.shape[0], _digits_per_word(radix)
    words = _words(data, _word_bytes(radix, per_word))
    limit = radix**per_word
    good = words.amax() < limit
    words = words.clamp(max=limit - 1)
    parts = 1
    while radix ** -(-per_word // parts) > _TABLE_LIMIT:
        parts += 1
    step = -(-per_word // parts)
    table = _digit_table(radix, step, data.device)
    pieces = []
    for _ in range(parts - 1):
        rest = words // radix**step
        pieces.append(select_rows(table, words - rest * radix**step))
        words = rest
    pieces.append(select_rows(table, words)[..., : per_word - step * (parts - 1)])
    digits = pieces[0] if parts == 1 else torch.cat(pieces, -1)
    return digits.reshape(rows, -1)[:, :count], good
