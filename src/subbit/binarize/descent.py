"""The compiled steps of fitting levels (descent.cpp), reached through ctypes.

What stands in for them elsewhere, in torch, is in `levels.py` and `refine.py`.

Built with the package where there is a C++ compiler. `SUBBIT_DESCENT=off` does without it.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from subbit.errors import RecipeError

__all__ = ["available", "exact_levels", "is_compiled", "level_gram", "sweep_columns"]

_VERSION = 3
_MAX_COLUMNS, _MAX_GROUP, _MAX_LEVELS, _MAX_TABLES = 256, 16, 16, 2  # as in descent.cpp


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_descent*.so")):
        try:
            found = ctypes.CDLL(str(path))
            version = found.subbit_descent_version()
        except (OSError, AttributeError):
            continue
        if version == _VERSION:
            pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
            found.subbit_descent_sweep.argtypes = [size] * 3 + [pointer] * 6
            found.subbit_descent_sweep.argtypes += [number, pointer, pointer, number, number]
            found.subbit_descent_levels.argtypes = [size, size, number] + [pointer] * 4 + [number]
            found.subbit_descent_gram.argtypes = [size, size, number] + [pointer] * 5 + [number]
            return found
    return None


def is_compiled() -> bool:
    """Whether the compiled sweep is there and `SUBBIT_DESCENT` does not turn it off."""
    switch = os.environ.get("SUBBIT_DESCENT", "on")
    if switch not in ("on", "off"):
        raise RecipeError(f"SUBBIT_DESCENT is '{switch}'; use on or off")
    return switch == "on" and _library() is not None


def available(codes: Tensor, m: int, counts: list[int]) -> bool:
    """Whether the compiled steps take `codes` `(b, rows)` and tables of `counts` levels."""
    columns, rows = codes.shape
    return (
        codes.device.type == "cpu"
        and rows > 0
        and 0 < columns <= _MAX_COLUMNS
        and 0 < m <= _MAX_GROUP
        and len(counts) <= _MAX_TABLES
        and all(0 < count <= _MAX_LEVELS for count in counts)
        and is_compiled()
    )


def sweep_columns(
    codes: Tensor,
    q: Tensor,
    RS: Tensor,
    S: Tensor,
    tables: list[tuple[Tensor, Tensor]],
    table_of: Tensor,
    m: int,
    remask: bool,
) -> Tensor:
    """One pass of coordinate descent over the columns; the new codes.

    The torch form beside it in `refine.py` sums in another order: where two levels are equally near
    the two may choose differently.

    Args:
        codes: int64 `(b, rows)`, 0 = pruned.
        q: float32 `(b, rows)`, what they mean; RS: float32 `(b, rows)`, `S (w - q)`.
        S: float32 `(b, b)`.
        tables: for every table its levels ascending, float32 `(L, rows)`, and the level index of
            each, int64 `(L, rows)`.
        table_of: bool or integer `(b,)`: the table of every column.
        m: columns a group.
        remask: exchange kept and pruned weights.
    """
    b, rows = codes.shape
    new = codes.to(torch.uint8).contiguous()
    values = torch.cat([levels for levels, _ in tables]).float().contiguous()
    order = (torch.cat([index for _, index in tables]) + 1).to(torch.uint8).contiguous()
    counts = torch.tensor([len(levels) for levels, _ in tables], dtype=torch.int32)
    columns = table_of.to(torch.uint8).contiguous()
    S, q, RS = S.float().contiguous(), q.contiguous(), RS.contiguous()
    failed = _library().subbit_descent_sweep(
        rows,
        b,
        m,
        S.data_ptr(),
        new.data_ptr(),
        q.data_ptr(),
        RS.data_ptr(),
        values.data_ptr(),
        order.data_ptr(),
        len(tables),
        counts.data_ptr(),
        columns.data_ptr(),
        int(remask),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"the descent over a block of {rows} x {b} weights found no memory")
    return new.long()


def level_gram(entry: Tensor, RS: Tensor, S: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """The normal equations of the level values of every row.

    Args:
        entry: uint8 `(rows, b)`: which value each weight has, 255 = none.
        RS: float32 `(rows, b)`, `(w - q) S`.
        S: float32 `(b, b)`.
        entries: number of values of a row.

    Returns:
        `A[r, t, u]`, the sum of S over pairs of columns of entries t and u, float32 `(rows,
        entries, entries)`, and `c[r, t]`, that of RS over the columns of entry t.
    """
    rows, b = entry.shape
    entry, RS, S = entry.contiguous(), RS.contiguous(), S.float().contiguous()
    A, c = RS.new_empty(rows, entries, entries), RS.new_empty(rows, entries)
    failed = _library().subbit_descent_gram(
        rows,
        b,
        entries,
        S.data_ptr(),
        entry.data_ptr(),
        RS.data_ptr(),
        A.data_ptr(),
        c.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(
            f"{rows} x {b} weights of {entries} levels are beyond descent.cpp's limits"
        )
    return A, c


def exact_levels(ascending: Tensor, mass: Tensor, kept: Tensor, count: int) -> Tensor:
    """The levels of least squared error of every row, float32 `(rows, count)`, ascending.

    Args:
        ascending: float32 `(rows, b)`: the kept weights of every row first, in ascending order.
        mass: float32 `(rows, b)`: what a squared error of each costs.
        kept: integer `(rows,)`: how many they are.
        count: number of levels; a row with fewer weights repeats its last level.
    """
    rows, b = ascending.shape
    ascending, mass = ascending.contiguous(), mass.float().contiguous()
    kept, levels = kept.int().contiguous(), ascending.new_empty(rows, count)
    failed = _library().subbit_descent_levels(
        rows,
        b,
        count,
        ascending.data_ptr(),
        mass.data_ptr(),
        kept.data_ptr(),
        levels.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(f"{rows} x {b} weights, {count} levels: beyond the limits of descent.cpp")
    return levels
