"""Random compressed linears that obey every rule of `CompressedLinear`."""

import torch
from hypothesis import strategies as st

from subbit.codes import LEVEL_KINDS, Compressed, CompressedLinear, LevelTable, SparseLinear

__all__ = ["NM", "TABLES", "linears", "make_linear", "make_sparse"]

NM = [*((n, 8) for n in range(1, 9)), (2, 4), (1, 4), (3, 16), (3, 5), None]
TABLES = [
    ("pairs", 3),
    ("pairs", 1),
    ("pairs", 2),
    ("symmetric", 3),
    ("residual", 1),
    ("residual", 3),
    ("symmetric_residual", 2),
    ("free", 1),
    ("free", 2),
    ("free", 3),
    ("free", 6),
    ("free", 7),
    ("free", 255),
    ("pairs", 127),
    ("grid", 1),
    ("grid", 2),
    ("grid", 8),
    ("grid", 200),
    ("grid", 255),
]


def _count(table: tuple[str, int]) -> int:
    return table[1] * LEVEL_KINDS[table[0]].levels_per_group


def _levels(table: tuple[str, int], rows: int, groups: int, g: torch.Generator) -> LevelTable:
    kind = LEVEL_KINDS[table[0]]
    params = torch.randn(rows, groups, kind.params(table[1]), generator=g).half()
    if kind.integers:
        params[..., -1] = torch.randint(_count(table), (rows, groups), generator=g).half()
    return LevelTable(*table, params)


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
    structured: bool = False,
    elements: bool = False,
    salient_group_size: int | None = None,
    column_scale: bool = False,
    scaled_params: int = 0,
) -> CompressedLinear:
    """Random codes and levels; a fifth of the columns salient if there is a salient table.

    With `elements` a fifth of the single weights instead; `structured` prunes whole columns
    (only where nm is None).
    """
    g = torch.Generator().manual_seed(seed)
    groups = -(-cols // group_size)
    keep = torch.ones(rows, cols, dtype=torch.bool)
    structured = structured and nm is None
    if nm is not None:
        keep = _mask(rows, cols, nm, g)
    elif structured:
        keep[:, torch.rand(cols, generator=g) < 0.5] = False
        keep[:, cols // 2] = True
    elif zeros:
        keep = torch.rand(rows, cols, generator=g) < 0.5
    codes = torch.randint(1, _count(levels) + 1, (rows, cols), generator=g)
    columns, extra = None, None
    if salient is not None:
        columns = torch.rand(cols, generator=g) < 0.2
        if elements:
            columns = keep & (torch.rand(rows, cols, generator=g) < 0.2)
            extra_groups = -(-cols // (salient_group_size or group_size))
        if not elements or not columns.any():
            elements, columns, extra_groups = False, columns.reshape(-1)[:cols], groups
        special = torch.randint(1, _count(salient) + 1, (rows, cols), generator=g)
        codes = torch.where(columns, special, codes)
        extra = _levels(salient, rows, extra_groups, g)
    codes = (codes * keep).to(torch.uint8)
    table = _levels(levels, rows, groups, g)
    scale = torch.randn(cols, generator=g).half() if column_scale else None
    if scaled_params and not elements:
        scale = torch.randn(scaled_params, cols, generator=g).half()
    size = salient_group_size if salient is not None and elements else None
    return CompressedLinear(codes, table, group_size, nm, columns, extra, size, structured, scale)


def make_sparse(
    rows: int,
    cols: int,
    nm: tuple[int, int] | None = (4, 8),
    structured: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> SparseLinear:
    """Random 16-bit values under a mask; without N:M single weights or whole columns pruned."""
    g = torch.Generator().manual_seed(seed)
    structured = structured and nm is None
    if nm is not None:
        mask = _mask(rows, cols, nm, g)
    else:
        mask = (torch.rand(1 if structured else rows, cols, generator=g) < 0.5).repeat(
            rows if structured else 1, 1
        )
        mask[:, cols // 2] = True
    values = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < 0.9)
    return SparseLinear((values * mask).to(dtype), mask, nm, structured)


def linears() -> st.SearchStrategy[Compressed]:
    """Linears of every structure: shapes, N:M, level kinds, salient weights, group sizes."""
    sparse = st.builds(
        make_sparse,
        rows=st.integers(1, 9),
        cols=st.integers(1, 100),
        nm=st.sampled_from(NM),
        structured=st.booleans(),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        seed=st.integers(0, 2**32),
    )
    coded = st.builds(
        make_linear,
        rows=st.integers(1, 9),
        cols=st.integers(1, 300),
        nm=st.sampled_from(NM),
        levels=st.sampled_from(TABLES),
        salient=st.sampled_from([None, *TABLES]),
        group_size=st.sampled_from([32, 64, 128, 1000]),
        zeros=st.booleans(),
        seed=st.integers(0, 2**32),
        structured=st.booleans(),
        elements=st.booleans(),
        salient_group_size=st.sampled_from([None, 32, 1000]),
        column_scale=st.booleans(),
        scaled_params=st.sampled_from([0, 0, 1, 4]),
    ).filter(_storable)
    return coded | sparse


def _storable(linear: CompressedLinear) -> bool:
    """Single salient weights take one code of the ordinary table."""
    single = linear.salient is not None and linear.salient.dim() == 2
    return not single or linear.levels.count < 255
