"""Random compressed linears whose levels are on the int8 grid, as the kernels want them."""

from dataclasses import replace

from hypothesis import strategies as st
from packed_examples import make_linear

from subbit.codes import CompressedLinear, on_int8_grid

__all__ = ["b3_linears", "make_int8"]

FITTING = [("pairs", 3), ("pairs", 1), ("symmetric", 2), ("residual", 1), ("free", 6), ("free", 1)]


def make_int8(rows: int, cols: int, **options) -> CompressedLinear:
    """As `make_linear`, levels rounded to int8."""
    linear = make_linear(rows, cols, **options)
    levels, salient_levels = on_int8_grid(linear.levels, linear.salient_levels)
    return replace(linear, levels=levels, salient_levels=salient_levels)


def b3_linears() -> st.SearchStrategy[CompressedLinear]:
    """Linears of every shape and structure that the resident layout holds."""
    seven = dict(levels=st.just(("free", 7)), salient=st.none())
    six = dict(
        levels=st.sampled_from(FITTING),
        salient=st.sampled_from([None, ("residual", 1), ("free", 4), ("pairs", 2)]),
    )
    eight = dict(levels=st.just(("free", 8)), salient=st.none(), nm=st.none(), zeros=st.just(False))
    return _b3_linears(**six) | _b3_linears(**seven) | _b3_linears(**eight)


def _b3_linears(**given: st.SearchStrategy) -> st.SearchStrategy[CompressedLinear]:
    defaults = dict(
        rows=st.integers(1, 40),
        cols=st.integers(1, 400),
        nm=st.sampled_from([(1, 8), (4, 8), (6, 8), (8, 8), (2, 4), (3, 5), None]),
        group_size=st.sampled_from([128, 256, 1000]),
        zeros=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    return st.builds(make_int8, **defaults | given)
