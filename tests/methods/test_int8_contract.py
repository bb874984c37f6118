"""`levels: int8`: every method's levels are on the grid, and the later blocks know it."""

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.codes import on_int8_grid
from subbit.errors import RecipeError
from subbit.methods import METHODS, Settings, make_method
from subbit.packed import pack, unpack
from subbit.recipe import Recipe

INT8 = Settings(blocksize=64, levels="int8")
WITH_LEVELS = [name for name, method in METHODS.items() if method.int8_levels]


def nm_of(name, nm):
    return None if METHODS[name].nm_use == "none" else nm


@pytest.mark.parametrize("name", WITH_LEVELS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_levels_are_int8_on_a_shared_scale(name, case):
    result = make_method(name, {}, INT8).compress(*problem(case), nm_of(name, (4, 8)))
    tables = [t for t in (result.levels, result.salient_levels) if t is not None]
    for table in tables:
        assert table.params.dtype == torch.int8 and table.scale.dtype == torch.bfloat16
        assert torch.equal(table.scale, result.levels.scale)
        assert table.params.shape[-1] == table.count
    assert result.dequantize().isfinite().all()
    assert torch.equal(unpack(*pack(result)).dequantize(), result.dequantize())


@pytest.mark.parametrize("name", WITH_LEVELS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_one_scale_a_row(name, case):
    settings = Settings(blocksize=64, levels="int8-row")
    result = make_method(name, {}, settings).compress(*problem(case), nm_of(name, (4, 8)))
    tables = [t for t in (result.levels, result.salient_levels) if t is not None]
    for table in tables:
        assert table.params.dtype == torch.int8 and table.scale.shape == (len(result.codes), 1)
        assert torch.equal(table.scale, result.levels.scale)
    layout, tensors = pack(result)
    assert layout.row_scale == (result.levels.params.shape[1] > 1)
    assert torch.equal(unpack(layout, tensors).dequantize(), result.dequantize())


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_the_price_is_small(name):
    W, stats = problem("plain")
    losses = [
        make_method(name, {}, Settings(blocksize=64, levels=levels))
        .compress(W, stats, nm_of(name, (6, 8)))
        .record["loss"]
        for levels in ("fp16", "int8", "int8-row")
    ]
    assert losses[1] < 1.05 * losses[0] and losses[2] < 1.05 * losses[0]


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
    assert recipe.override(["levels=int8-row"]).levels == "int8-row"


def test_which_methods_take_it():
    assert set(WITH_LEVELS) == {"pbs2p", "pbs2p-plus", "billm", "arb", "stbllm", "xnor"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(WITH_LEVELS)))
def test_the_others_refuse_it(name):
    with pytest.raises(RecipeError, match=f"'{name}' has no levels.*levels: fp16"):
        make_method(name, {}, INT8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arb", {"variant": "arb-rc"}, "'arb' with variant arb-rc"),
        ("billm", {"published": True}, "'billm' with published"),
        ("stbllm", {"published": True}, "'stbllm' with published"),
    ],
)
def test_options_that_it_does_not_go_with(name, options, message):
    with pytest.raises(RecipeError, match=message):
        make_method(name, options, INT8)
    make_method(name, options, Settings(blocksize=64))


@pytest.mark.parametrize("codebook", ["free", "groups"])
def test_passes_see_the_stored_levels(codebook):
    """Every pass lowers the loss of what is stored, not of what was fitted."""
    W, stats = problem("plain")
    losses = [
        make_method("pbs2p-plus", {"codebook": codebook, "passes": passes}, INT8)
        .compress(W, stats, (6, 8))
        .record["loss"]
        for passes in (0, 3)
    ]
    assert losses[1] < losses[0]
