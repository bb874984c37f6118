"""Random compressed linears whose levels are on the int8 grid, as the kernels want them."""

from dataclasses import replace

from hypothesis import strategies as st
from packed_examples import make_linear

from subbit.codes import CompressedLinear, on_int8_grid, row_scale

__all__ = ["b2_linears", "make_int8", "resident_linears"]

FITTING = [("pairs", 3), ("pairs", 1), ("symmetric", 2), ("residual", 1), ("free", 6), ("free", 1)]


def make_int8(rows: int, cols: int, by_row: bool = False, **options) -> CompressedLinear:
    """As `make_linear`, levels rounded to int8, on one scale for each row if so wanted."""
    linear = make_linear(rows, cols, **options)
    scale = row_scale(linear.levels.values()) if by_row else None
    levels, salient_levels = on_int8_grid(linear.levels, linear.salient_levels, scale)
    return replace(linear, levels=levels, salient_levels=salient_levels)


def resident_linears() -> st.SearchStrategy[CompressedLinear]:
    """Linears of every shape and structure that the resident layouts hold."""
    seven = dict(levels=st.just(("free", 7)), salient=st.none())
    six = dict(
        levels=st.sampled_from(FITTING),
        salient=st.sampled_from([None, ("residual", 1), ("free", 4), ("pairs", 2)]),
    )
    unpruned = dict(salient=st.none(), nm=st.none(), zeros=st.just(False))
    eight = dict(levels=st.just(("free", 8)), **unpruned)
    return _linears(**six) | _linears(**seven) | _linears(**eight) | b2_linears()


def b2_linears() -> st.SearchStrategy[CompressedLinear]:
    """Those whose codes take two bits."""
    three = dict(levels=st.sampled_from([("free", 3), ("pairs", 1)]), salient=st.none())
    four = dict(levels=st.just(("free", 4)), salient=st.none(), nm=st.none(), zeros=st.just(False))
    return _linears(**three) | _linears(**four)


def _linears(**given: st.SearchStrategy) -> st.SearchStrategy[CompressedLinear]:
    defaults = dict(
        rows=st.integers(1, 150),
        cols=st.integers(1, 400),
        nm=st.sampled_from([(1, 8), (4, 8), (6, 8), (8, 8), (2, 4), (3, 5), None]),
        group_size=st.sampled_from([128, 256, 1000]),
        zeros=st.booleans(),
        by_row=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    return st.builds(make_int8, **defaults | given)
