"""`levels: int8`: every method's levels are on the grid, and the later blocks know it."""

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.codes import on_int8_grid
from subbit.methods import METHODS, Settings, make_method
from subbit.recipe import Recipe

INT8 = Settings(blocksize=64, levels="int8")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_levels_are_int8_on_a_shared_scale(name, case):
    result = make_method(name, {}, INT8).compress(*problem(case), (4, 8))
    tables = [t for t in (result.levels, result.salient_levels) if t is not None]
    for table in tables:
        assert table.params.dtype == torch.int8 and table.scale.dtype == torch.bfloat16
        assert torch.equal(table.scale, result.levels.scale)
        assert table.params.shape[-1] == table.count
    assert result.dequantize().isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_the_price_is_small(name):
    W, stats = problem("plain")
    losses = [
        make_method(name, {}, Settings(blocksize=64, levels=levels))
        .compress(W, stats, (6, 8))
        .record["loss"]
        for levels in ("fp16", "int8")
    ]
    assert losses[1] < 1.05 * losses[0]


def test_the_rounding_error_is_absorbed_by_later_blocks():
    """Rounding afterwards would leave the later blocks' codes and levels as they were."""
    W, stats = problem("plain")
    snapped = make_method("pbs2p", {}, INT8).compress(W, stats, (6, 8))
    plain = make_method("pbs2p", {}, Settings(blocksize=64)).compress(W, stats, (6, 8))
    afterwards = on_int8_grid(plain.levels, plain.salient_levels)[0]
    assert torch.equal(snapped.levels.params[:, 0], afterwards.params[:, 0])
    assert not torch.equal(snapped.levels.params[:, -1], afterwards.params[:, -1])


def test_the_recipe_names_it():
    recipe = Recipe(name="x", method="pbs2p", nm="6:8")
    assert recipe.levels == "fp16"
    assert recipe.override(["levels=int8"]).levels == "int8"
