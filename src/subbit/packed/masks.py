"""N:M masks as numbers: which of the C(M, N) patterns each group of M columns has.

A pattern is an M-bit integer, column 0 of the group its lowest bit. The patterns with exactly N
ones, in increasing order, are numbered 0, 1, ... C(M, N) - 1; a mask is stored as these numbers.
"""

from functools import cache
from math import comb

import torch
from torch import Tensor

from subbit.packed.codecs import select_rows

__all__ = ["MAX_M", "index_to_mask", "mask_index_bits", "mask_to_index", "patterns", "tail_columns"]

MAX_M = 16


def mask_index_bits(n: int, m: int) -> int:
    """Bits of one pattern number: `ceil(log2 C(M, N))`, 0 when N = M."""
    return (comb(m, n) - 1).bit_length()


def tail_columns(cols: int, n: int, m: int) -> tuple[int, int]:
    """How the last group is padded: `(virtual columns, virtual columns marked as kept)`.

    With r = cols % M real columns (r > 0) the group keeps min(N, r) of them; when r < N the first
    N - r virtual columns count as kept, so that its pattern too has exactly N ones.
    """
    rest = cols % m
    return (m - rest, max(n - rest, 0)) if rest else (0, 0)


def patterns(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """All M-bit patterns with N ones in increasing order, bool `(C(M, N), M)`."""
    if torch.compiler.is_compiling():  # it would look through the cache
        return _patterns(n, m, device)
    ones = torch.frombuffer(bytearray(_ones(n, m)), dtype=torch.bool)
    return ones.view(-1, m).to(device)


def _patterns(n: int, m: int, device: torch.device | None) -> Tensor:
    numbers = torch.arange(1 << m, dtype=torch.int32, device=device)
    bits = (numbers[:, None] >> torch.arange(m, dtype=torch.int32, device=device) & 1).bool()
    return bits[bits.sum(-1) == n]


@cache
def _ones(n: int, m: int) -> bytes:
    """The patterns, a byte an element; a tensor could be changed by others."""
    return bytes(_patterns(n, m, torch.device("cpu")).flatten().tolist())


def mask_to_index(mask: Tensor, n: int) -> Tensor:
    """Number the patterns of a mask.

    Args:
        mask: bool `(..., M)`, exactly N ones in the last dimension.

    Returns:
        int32 `(...)`, below C(M, N).
    """
    m = mask.shape[-1]
    weights = 1 << torch.arange(m, dtype=torch.int32, device=mask.device)
    numbers = (patterns(n, m, mask.device).int() * weights).sum(-1)
    rank = torch.zeros(1 << m, dtype=torch.int32, device=mask.device)
    rank[numbers] = torch.arange(len(numbers), dtype=torch.int32, device=mask.device)
    pattern = mask[..., 0].int()
    for j in range(1, m):
        pattern |= mask[..., j].int() << j
    return rank.index_select(0, pattern.flatten()).view(pattern.shape)


def index_to_mask(index: Tensor, n: int, m: int) -> Tensor:
    """Undo `mask_to_index`: bool `(..., M)` for integers `(...)` below C(M, N)."""
    table = patterns(n, m, index.device).view(torch.uint8)
    return select_rows(table, index).contiguous().view(torch.bool)
