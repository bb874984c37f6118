"""What every method promises, whatever it is called."""

import math
from functools import cache
from typing import get_args

import pytest
import torch
from problems import PROBLEMS, large_problem, problem

from subbit.codes import CompressedLinear
from subbit.errors import ModelError, NonFiniteError, RecipeError
from subbit.linalg import relative_loss
from subbit.methods import METHODS, LinearStats, Settings, list_methods, make_method
from subbit.packed import pack, unpack
from subbit.packed.linear import PackedLinear
from subbit.recipe import list_recipes

SHIPPED = {recipe.name: recipe for recipe in list_recipes()}
SETTINGS = Settings(blocksize=64)


def variants():
    """Every recipe; a pruning one of every method that can; every choice of pruning and group."""
    found = dict(SHIPPED)
    pruned = {recipe.method for recipe in SHIPPED.values() if recipe.nm is not None}
    for recipe in SHIPPED.values():
        if METHODS[recipe.method].nm_use == "optional" and recipe.method not in pruned:
            found[f"{recipe.name}-4-8"] = recipe.override(["nm=4:8"])
    seen = set()
    for recipe in list(found.values()):
        fields = METHODS[recipe.method].Opt.model_fields
        for option in ("pruning", "group"):
            key = (recipe.method, option)
            means_something = option in fields and (option == "group" or recipe.nm is not None)
            if means_something and key not in seen:
                seen.add(key)
                for choice in get_args(fields[option].annotation):
                    changed = recipe.override([f"options.{option}={choice}"])
                    if choice != fields[option].default:
                        found[f"{recipe.name}-{choice}"] = changed
    return found


RECIPES = variants()


def build(recipe, settings=SETTINGS):
    return make_method(recipe.method, recipe.options, settings)


@cache
def fit(name, case):
    """One recipe's result on one problem; the tests only look at it."""
    W, stats = problem(case)
    return build(RECIPES[name]).compress(W, stats, RECIPES[name].nm)


def assert_same_file(one, other):
    layouts, tensors = zip(pack(one), pack(other), strict=True)
    assert layouts[0] == layouts[1]
    for name, tensor in tensors[0].items():
        # as bytes: 0.0 and -0.0 are not the same file
        assert torch.equal(tensor.view(torch.uint8), tensors[1][name].view(torch.uint8)), name


@pytest.fixture(params=RECIPES, ids=str)
def name(request):
    return request.param


@pytest.fixture(params=PROBLEMS, ids=str)
def case(request):
    return request.param


def test_every_method_has_a_recipe():
    assert {recipe.method for recipe in SHIPPED.values()} == set(METHODS)
    assert {m["name"] for m in list_methods()} == set(METHODS)


def test_results_are_sound_on_every_problem(name, case):
    W, stats = problem(case)
    result = fit(name, case)
    W_hat = result.dequantize()
    assert W_hat.shape == W.shape and W_hat.dtype == torch.float32
    assert torch.isfinite(W_hat).all()
    assert math.isfinite(result.record["loss"]) and result.record["loss"] >= 0
    assert result.record["loss"] == relative_loss(W, W_hat, stats.H)
    assert 0 <= result.record["salient_share"] <= 1
    assert result.record["damping"] is None or result.record["damping"] > 0
    assert result.record["tokens"] == stats.tokens


def test_input_is_not_modified(name):
    W, stats = problem("dead_columns")
    before = W.clone(), stats.H.clone(), stats.mean.clone()
    build(RECIPES[name]).compress(W, stats, RECIPES[name].nm)
    for tensor, copy in zip((W, stats.H, stats.mean), before, strict=True):
        assert torch.equal(tensor, copy)


BLIND = ("rtn", "xnor", "magnitude", "random")
"""Methods that look at no input."""


@pytest.mark.parametrize("levels", ["own", "int8-row"])
def test_a_weight_without_input_decides_nothing(name, levels):
    """No scale of a row, no grid, no place in a mask."""
    recipe = RECIPES[name]
    row = levels == "int8-row"
    if recipe.method in BLIND or (row and not METHODS[recipe.method].int8_levels):
        pytest.skip("looks at no input, or has no int8 levels")
    if row and recipe.options.get("variant") == "arb-rc":
        pytest.skip("has no int8 levels")
    settings = Settings(blocksize=64, levels="int8-row" if row else recipe.levels)
    W, stats = problem("dead_columns")
    dead = stats.H.diagonal() == 0
    larger = W * (1 + 99 * dead)
    one, other = (build(recipe, settings).compress(w, stats, recipe.nm) for w in (W, larger))
    live = (part.dequantize()[:, ~dead] for part in (one, other))
    assert torch.equal(*live)


def test_what_is_pruned_is_what_was_asked_for(name, case):
    recipe, result = RECIPES[name], fit(name, case)
    kept, dense = result.kept, result.dequantize()
    assert not dense[~kept].any()
    pruning = recipe.options.get("pruning", "semi-structured")
    if recipe.nm is None:
        assert result.nm is None and kept.all()
    elif pruning == "semi-structured":
        assert result.nm == recipe.nm
        for group in kept.split(recipe.nm[1], 1):
            assert (group.sum(1) == min(recipe.nm[0], group.shape[1])).all()
    else:
        assert result.nm is None
        assert result.structured == (pruning == "structured")
        assert not result.structured or torch.equal(kept, kept[:1].expand_as(kept))
        share = recipe.nm[0] / recipe.nm[1]
        rounded = 0.5 * math.ceil(kept.shape[1] / SETTINGS.blocksize)  # once for every block
        assert abs(float(kept.float().mean()) - share) * kept.shape[1] <= rounded + 1e-5


def test_the_file_means_the_same_weights(name, case):
    result = fit(name, case)
    found = unpack(*pack(result))
    assert torch.equal(found.dequantize(), result.dequantize())
    assert_same_file(found, result)


@pytest.mark.parametrize("case", ["plain", "ragged", "rank_deficient"])
def test_same_input_same_output(name, case):
    W, stats = problem(case)
    method, nm, rng = build(RECIPES[name]), RECIPES[name].nm, torch.get_rng_state()
    method.compress(*problem("outliers"), nm)  # leaves no trace
    again = method.compress(W, stats, nm)
    assert_same_file(fit(name, case), again)
    assert fit(name, case).record == again.record
    assert torch.equal(rng, torch.get_rng_state())


def test_the_number_of_threads_does_not_change_the_file(name):
    assert_threads_do_not_matter(RECIPES[name], *problem("plain"), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_number_of_threads_does_not_change_a_larger_file(method):
    """Large enough for torch and its libraries to share the work out among threads."""
    recipe = next(recipe for recipe in SHIPPED.values() if recipe.method == method)
    assert_threads_do_not_matter(recipe, *large_problem(), Settings())


def assert_threads_do_not_matter(recipe, W, stats, settings):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(build(recipe, settings).compress(W, stats, recipe.nm))
    finally:
        torch.set_num_threads(threads)
    assert_same_file(*results)


@pytest.mark.parametrize("blocksize", [32, 1024])
def test_any_group_size_up_to_the_whole_row(name, blocksize):
    W, stats = problem("ragged")
    recipe = RECIPES[name]
    settings = Settings(blocksize=blocksize)
    result = build(recipe, settings).compress(W, stats, recipe.nm)
    assert torch.isfinite(result.dequantize()).all()
    assert torch.equal(unpack(*pack(result)).dequantize(), result.dequantize())
    pruning = recipe.options.get("pruning", "semi-structured")
    if recipe.nm is not None and pruning == "semi-structured":
        assert torch.equal(result.kept.sum(1), torch.full((24,), kept_of(recipe.nm, 92)))
    if isinstance(result, CompressedLinear) and "group" not in recipe.options:
        groups = 1 if recipe.method == "xnor" else math.ceil(92 / blocksize)
        assert result.levels.params.shape[1] == groups


def kept_of(nm, cols):
    return nm[0] * (cols // nm[1]) + min(nm[0], cols % nm[1])


@pytest.mark.parametrize("case", ["plain", "ragged", "dead_columns"])
def test_loss_is_not_above_that_of_rounding_at_the_same_bits(name, case):
    result = fit(name, case)
    if not isinstance(result, CompressedLinear):
        assert result.record["loss"] < 1  # less than that of all zeros
        return
    bits = PackedLinear.from_compressed(result, None, torch.float32).bits().paper_bits
    if RECIPES[name].method == "gptq" and bits == 1:
        pytest.skip("with errors as large as the grid nothing speaks for absorbing them")
    whole_rows = result.group_size >= result.shape[1]
    rounding = RECIPES["rtn-1-row"] if whole_rows else SHIPPED["rtn-1"]
    options = {**rounding.options, "bits": max(1, math.floor(bits))}
    rtn = make_method("rtn", options, SETTINGS).compress(*problem(case))
    assert result.record["loss"] <= rtn.record["loss"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bad_input_is_refused_by_name(method):
    W, stats = problem("plain")
    maker = make_method(method, {}, SETTINGS)
    nm = None if maker.nm_use == "none" else (4, 8)
    for value in (float("nan"), float("inf")):
        bad = W.clone()
        bad[1, 2] = value
        with pytest.raises(NonFiniteError, match=r"test\.plain.*1 NaN or Inf.*weights"):
            maker.compress(bad, stats, nm)
        H = stats.H.clone()
        H[0, 0] = value
        with pytest.raises(NonFiniteError, match=r"test\.plain.*calibration inputs"):
            maker.compress(W, LinearStats(H, stats.tokens, stats.name), nm)
        mean = stats.mean.clone()
        mean[3] = value
        with pytest.raises(NonFiniteError, match=r"test\.plain.*mean"):
            maker.compress(W, LinearStats(stats.H, stats.tokens, stats.name, mean), nm)
    with pytest.raises(ModelError, match=r"\(24, 160\).*\(8, 8\)"):
        maker.compress(W, LinearStats(torch.eye(8), 3, "x"), nm)
    with pytest.raises(ModelError, match=r"\(24, 160\).*\(8,\)"):
        maker.compress(W, LinearStats(stats.H, 3, "x", torch.ones(8)), nm)
    with pytest.raises(ModelError, match="no calibration token"):
        maker.compress(W, LinearStats(stats.H, 0, "x"), nm)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_nm_that_the_method_cannot_follow_is_refused(method):
    W, stats = problem("plain")
    maker = make_method(method, {}, SETTINGS)
    if maker.nm_use == "none":
        with pytest.raises(RecipeError, match=f"'{method}' does not prune.*nm: null"):
            maker.compress(W, stats, (4, 8))
    if maker.nm_use == "needed":
        with pytest.raises(RecipeError, match=f"'{method}' prunes; give it nm"):
            maker.compress(W, stats, None)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_unknown_options_name_the_nearest(method):
    with pytest.raises(RecipeError, match=f"{method}.*'zzz'"):
        make_method(method, {"zzz": 1})


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'pbs2p'"):
        make_method("pbsp2")
