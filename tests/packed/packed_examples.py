"""Random compressed linears that obey every rule of `CompressedLinear`."""

import torch
from hypothesis import strategies as st

from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable

__all__ = ["NM", "TABLES", "linears", "make_linear"]

NM = [*((n, 8) for n in range(1, 9)), (2, 4), (1, 4), (3, 16), (3, 5), None]
TABLES = [
    ("pairs", 3),
    ("pairs", 1),
    ("pairs", 2),
    ("symmetric", 3),
    ("residual", 1),
    ("residual", 3),
    ("free", 1),
    ("free", 2),
    ("free", 3),
    ("free", 6),
    ("free", 7),
    ("free", 255),
    ("pairs", 127),
]


def _count(table: tuple[str, int]) -> int:
    return table[1] * LEVEL_KINDS[table[0]].levels_per_group


def _levels(table: tuple[str, int], rows: int, groups: int, g: torch.Generator) -> LevelTable:
    width = table[1] * LEVEL_KINDS[table[0]].params_per_group
    return LevelTable(*table, torch.randn(rows, groups, width, generator=g).half())


def _mask(rows: int, cols: int, nm: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    n, m = nm
    score = torch.rand(rows, -(-cols // m) * m, generator=g)
    score[:, cols:] = 2.0  # padding loses to every real column
    rank = score.view(rows, -1, m).argsort(-1).argsort(-1)
    return (rank < n).view(rows, -1)[:, :cols]


def make_linear(
    rows: int,
    cols: int,
    nm: tuple[int, int] | None = (4, 8),
    levels: tuple[str, int] = ("pairs", 3),
    salient: tuple[str, int] | None = ("residual", 1),
    group_size: int = 128,
    zeros: bool = False,
    seed: int = 0,
) -> CompressedLinear:
    """Random codes and levels; a fifth of the columns salient if there is a salient table."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-cols // group_size)
    codes = torch.randint(1, _count(levels) + 1, (rows, cols), generator=g)
    columns, extra = None, None
    if salient is not None:
        columns = torch.rand(cols, generator=g) < 0.2
        special = torch.randint(1, _count(salient) + 1, (rows, cols), generator=g)
        codes = torch.where(columns, special, codes)
        extra = _levels(salient, rows, groups, g)
    if nm is not None:
        codes = codes * _mask(rows, cols, nm, g)
    elif zeros:
        codes = codes * (torch.rand(rows, cols, generator=g) < 0.5)
    table = _levels(levels, rows, groups, g)
    return CompressedLinear(codes.to(torch.uint8), table, group_size, nm, columns, extra)


def linears() -> st.SearchStrategy[CompressedLinear]:
    """Linears of every structure: shapes, N:M, level kinds, salient columns, group sizes."""
    return st.builds(
        make_linear,
        rows=st.integers(1, 9),
        cols=st.integers(1, 300),
        nm=st.sampled_from(NM),
        levels=st.sampled_from(TABLES),
        salient=st.sampled_from([None, *TABLES]),
        group_size=st.sampled_from([32, 64, 128, 1000]),
        zeros=st.booleans(),
        seed=st.integers(0, 2**32),
    )
