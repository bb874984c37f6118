"""Recipes: shipped ones, files, overrides, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from subbit.errors import RecipeError
from subbit.recipe import Recipe, list_recipes, load_recipe

NUMBER_LIKE = st.from_regex(r"[-+]?[0-9.]{1,2}[:eE_x]?[-+]?[0-9]{0,2}", fullmatch=True)
SHIPPED = {"pbs2p-3-8", "pbs2p-4-8", "pbs2p-5-8", "pbs2p-6-8", "pbs2p-2-4"}


def make(**changes: object) -> Recipe:
    return Recipe(**{"name": "mine", "method": "pbs2p", "nm": "4:8", **changes})


def test_every_shipped_recipe_loads_under_its_own_name():
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    assert set(recipes) >= SHIPPED
    for name, recipe in recipes.items():
        assert load_recipe(name) == recipe
        assert name == recipe.method or name.startswith(f"{recipe.method}-")
        if recipe.nm is not None:
            assert name.endswith("-{}-{}".format(*recipe.nm))


def test_the_pbs2p_recipes_differ_in_nm_only():
    def rest(name: str) -> dict:
        data = load_recipe(name).model_dump()
        return {key: value for key, value in data.items() if key not in ("name", "nm")}

    assert all(rest(name) == rest("pbs2p-6-8") for name in SHIPPED)
    options = load_recipe("pbs2p-6-8").options
    assert options["split_grid"] == [0.1, 0.9, 160]
    assert options["sigma"] == 2.0
    assert options["spbo"] is True


def test_defaults():
    recipe = make()
    assert (recipe.nm, recipe.blocksize, recipe.percdamp) == ((4, 8), 128, 0.01)
    calibration = recipe.calibration
    assert (calibration.source, calibration.nsamples, calibration.seqlen) == ("c4", 128, 2048)
    assert (calibration.bos, calibration.sample, calibration.seed) == ("none", "first", 0)
    assert (recipe.coarse.allocation, recipe.coarse.n_high, recipe.coarse.n_low) == (
        "layer_importance",
        1,
        1,
    )


@settings(deadline=None)
@given(
    n=st.integers(1, 16),
    extra=st.integers(0, 15),
    blocks=st.integers(1, 20),
    percdamp=st.floats(0, 1),
    skip=st.lists(st.text(max_size=8), max_size=3),
    options=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | NUMBER_LIKE,
        max_size=4,
    ),
)
def test_yaml_round_trip(tmp_path_factory, n, extra, blocks, percdamp, skip, options):
    m = min(n + extra, 16)
    nm = f"{n}:{m}" if skip else None
    recipe = make(nm=nm, blocksize=blocks * m, percdamp=percdamp, skip=skip)
    recipe = Recipe(**{**recipe.model_dump(), "options": options})
    path = tmp_path_factory.mktemp("recipes") / "r.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe


def test_a_file_without_a_name_takes_its_stem_and_nm_needs_no_quotes(tmp_path):
    path = tmp_path / "house.yaml"
    path.write_text("method: pbs2p\nnm: 6:8\noptions: {ridge: 1e-3, grid: [0.1, 2., 7]}\n")
    recipe = load_recipe(str(path))
    assert recipe.name == "house"
    assert recipe.nm == (6, 8)
    assert recipe.options == {"ridge": 0.001, "grid": [0.1, 2.0, 7]}


def test_override():
    recipe = load_recipe("pbs2p-6-8")
    changed = recipe.override(
        [
            "calibration.nsamples=32",
            "seqlen=64",
            "n_low=0",
            "nm=5:8",
            "tau=5",
            "options.spbo=false",
            "options.new=[1, x]",
            "percdamp=1e-2",
            "calibration.source=my text.txt",
        ]
    )
    assert changed.calibration.nsamples == 32
    assert changed.calibration.seqlen == 64
    assert changed.calibration.source == "my text.txt"
    assert changed.coarse.n_low == 0
    assert changed.nm == (5, 8)
    assert changed.percdamp == 0.01
    assert changed.options == {**recipe.options, "tau": 5, "spbo": False, "new": [1, "x"]}
    assert recipe == load_recipe("pbs2p-6-8")
    assert recipe.override([]) == recipe


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tau", ["tau", "key=value"]),
        ("=5", ["key=value"]),
        ("calibration.nsample=3", ["calibration.nsample", "did you mean 'nsamples'"]),
        ("blocksiz=64", ["blocksiz", "did you mean 'blocksize'"]),
        ("name.x=3", ["name.x"]),
        ("calibration.nsamples=0", ["calibration.nsamples", "0"]),
        ("calibration.nsamples=many", ["calibration.nsamples", "'many'"]),
        ("tau=[1", ["tau=[1", "YAML"]),
        ("nm=9:8", ["9:8", "N <= M"]),
        ("nope.x=1", ["nope"]),
    ],
)
def test_bad_settings(setting, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("pbs2p-6-8").override([setting])
    assert_one_sentence(caught.value, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nm": "9:8"}, ["9:8", "N <= M"]),
        ({"nm": "0:8"}, ["0:8", "1 <= N"]),
        ({"nm": "4:17"}, ["4:17", "16"]),
        ({"nm": "half"}, ["'half'", "N:M"]),
        ({"nm": 368}, ["368", "N:M"]),
        ({"nm": "3:7"}, ["128", "7", "multiple"]),
        ({"blocksize": 100}, ["100", "8", "multiple"]),
        ({"blocksize": 0}, ["blocksize", "0"]),
        ({"percdamp": -1}, ["percdamp", "-1"]),
        ({"percdamp": float("nan")}, ["percdamp", "finite"]),
        ({"mehtod": "x"}, ["mehtod", "did you mean 'method'"]),
        ({"calibration": {"sed": 1}}, ["calibration.sed", "did you mean 'seed'"]),
        ({"coarse": {"n_hihg": 1}}, ["coarse.n_hihg", "did you mean 'n_high'"]),
        ({"calibration": {"bos": "always"}}, ["calibration.bos", "always", "window"]),
        ({"options": {"tau": float("inf")}}, ["options.tau", "inf", "finite"]),
        ({"options": {"when": {"a": object()}}}, ["options.when"]),
        ({"coarse": "uniform"}, ["coarse", "uniform"]),
    ],
)
def test_bad_recipes(changes, words):
    with pytest.raises(RecipeError) as caught:
        make(**changes)
    assert_one_sentence(caught.value, ["mine", *words])


def assert_one_sentence(error: RecipeError, words: list[str]) -> None:
    message = str(error)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_key_is_named():
    with pytest.raises(RecipeError, match="lacks the key 'nm'"):
        Recipe(name="mine", method="pbs2p")


def test_offsets_that_leave_the_group_are_for_the_coarse_stage_to_clamp():
    assert make(nm="1:8").coarse.n_low == 1
    assert make(nm="8:8").coarse.n_high == 1


def test_nm_null_means_no_pruning(tmp_path):
    assert make(nm=None, blocksize=100).nm is None
    path = tmp_path / "plain.yaml"
    path.write_text("method: rtn\nnm: null\n")
    assert load_recipe(path).nm is None
    assert load_recipe("pbs2p-6-8").override(["nm=null"]).nm is None
    assert load_recipe("rtn-2").override(["nm=6:8"]).nm == (6, 8)


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().blocksize = 64


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match=r"pbs2p-68.*did you mean 'pbs2p-6-8'"):
        load_recipe("pbs2p-68")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words", ""])
def test_files_that_are_no_recipe(tmp_path: Path, text: str):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_wrong_choice_is_answered_with_the_right_ones():
    recipe = load_recipe("pbs2p-plus-6-8")
    for said, meant in (("true", True), ("false", False), ("relative", "relative")):
        assert recipe.override([f"asymmetry.residual={said}"]).asymmetry.residual == meant
    with pytest.raises(RecipeError, match=r"asymmetry.residual is 'relatve' .*'relative'"):
        recipe.override(["asymmetry.residual=relatve"])
