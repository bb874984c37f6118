"""What every method promises, whatever it is called."""

import math

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.errors import ModelError, NonFiniteError, RecipeError
from subbit.linalg import relative_loss
from subbit.methods import METHODS, LinearStats, Settings, list_methods, make_method
from subbit.packed.pack import pack, unpack
from subbit.recipe import list_recipes

RECIPES = {recipe.name: recipe for recipe in list_recipes()}
SETTINGS = Settings(blocksize=64)


def build(recipe):
    return make_method(recipe.method, recipe.options, SETTINGS)


@pytest.fixture(params=RECIPES, ids=str)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(params=PROBLEMS, ids=str)
def case(request):
    return problem(request.param)


def test_every_method_has_a_recipe():
    assert {recipe.method for recipe in RECIPES.values()} == set(METHODS)
    assert {m["name"] for m in list_methods()} == set(METHODS)


def test_results_are_sound_on_every_problem(recipe, case):
    W, stats = case
    before = W.clone(), stats.H.clone()
    result = build(recipe).compress(W, stats, recipe.nm)
    assert torch.equal(W, before[0]) and torch.equal(stats.H, before[1])
    W_hat = result.dequantize()
    assert W_hat.shape == W.shape and W_hat.dtype == torch.float32
    assert torch.isfinite(W_hat).all()
    assert math.isfinite(result.record["loss"]) and result.record["loss"] >= 0
    assert result.record["loss"] == relative_loss(W, W_hat, stats.H)
    assert 0 <= result.record["salient_share"] <= 1
    assert result.record["damping"] is None or result.record["damping"] > 0
    assert result.record["tokens"] == stats.tokens


def test_n_of_m_holds_exactly_in_the_codes_and_in_the_weights(recipe, case):
    W, stats = case
    n, m = recipe.nm
    result = build(recipe).compress(W, stats, recipe.nm)
    assert result.nm == recipe.nm
    for tensor, exact in ((result.codes != 0, True), (result.dequantize() != 0, False)):
        for start in range(0, W.shape[1], m):
            group = tensor[:, start : start + m]
            kept = group.sum(1)
            assert (kept <= min(n, group.shape[1])).all()
            if exact:
                assert (kept == min(n, group.shape[1])).all()


def test_the_file_means_the_same_weights(recipe, case):
    W, stats = case
    result = build(recipe).compress(W, stats, recipe.nm)
    assert torch.equal(unpack(*pack(result)).dequantize(), result.dequantize())


@pytest.mark.parametrize("name", ["plain", "ragged", "rank_deficient"])
def test_same_input_same_output(recipe, name):
    W, stats = problem(name)
    method, rng = build(recipe), torch.get_rng_state()
    first = method.compress(W, stats, recipe.nm)
    method.compress(*problem("outliers"), recipe.nm)  # leaves no trace
    again = method.compress(W, stats, recipe.nm)
    fresh = build(recipe).compress(W, stats, recipe.nm)
    for other in (again, fresh):
        assert torch.equal(first.codes, other.codes)
        assert torch.equal(first.levels.params, other.levels.params)
        assert first.record == other.record
    assert torch.equal(rng, torch.get_rng_state())


def test_the_number_of_threads_does_not_change_the_result(recipe):
    W, stats = problem("plain")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(build(recipe).compress(W, stats, recipe.nm))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].levels.params, results[1].levels.params)


def test_calibrated_compression_beats_pruning_to_nothing(recipe):
    W, stats = problem("plain")
    assert build(recipe).compress(W, stats, recipe.nm).record["loss"] < 0.5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bad_input_is_refused_by_name(method):
    W, stats = problem("plain")
    maker = make_method(method, {}, SETTINGS)
    for value in (float("nan"), float("inf")):
        bad = W.clone()
        bad[1, 2] = value
        with pytest.raises(NonFiniteError, match=r"test\.plain.*1 NaN or Inf.*weights"):
            maker.compress(bad, stats, (4, 8))
        H = stats.H.clone()
        H[0, 0] = value
        with pytest.raises(NonFiniteError, match=r"test\.plain.*calibration inputs"):
            maker.compress(W, LinearStats(H, stats.tokens, stats.name), (4, 8))
    with pytest.raises(ModelError, match=r"\(24, 160\).*\(8, 8\)"):
        maker.compress(W, LinearStats(torch.eye(8), 3, "x"), (4, 8))
    with pytest.raises(ModelError, match="no calibration token"):
        maker.compress(W, LinearStats(stats.H, 0, "x"), (4, 8))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_unknown_options_name_the_nearest(method):
    with pytest.raises(RecipeError, match=f"{method}.*'zzz'"):
        make_method(method, {"zzz": 1})


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'pbs2p'"):
        make_method("pbsp2")
