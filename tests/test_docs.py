"""docs/methods.md names what there is, and nothing that there is not."""

import re
from pathlib import Path

import pytest
import yaml

from subbit.methods import METHODS, make_method
from subbit.recipe import list_recipes, load_recipe
from subbit.study.overview import recipe_bits

TEXT = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
RECIPES = {recipe.name: recipe for recipe in list_recipes()}
SETTING = re.compile(r"`([a-z_.]+)=([^`]+)`")


def sections() -> dict[str, str]:
    """The part of the text that belongs to each method, by its heading."""
    parts = re.split(r"^(#{2,3} .*)$", TEXT, flags=re.MULTILINE)
    named = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        found = re.match(r"### `([^`]+)` – ", heading)
        if found:
            named[found[1]] = heading + body
    return named


SECTIONS = sections()


def table() -> dict[str, tuple[str, str]]:
    """Paper and stored bits of every recipe in the table of bits, as they are printed."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|", TEXT, flags=re.MULTILINE)
    printed = {name: row[1:] for row in rows for name in re.findall(r"`([a-z][^`]+)`", row[0])}
    pruned = next(row[1:] for row in rows if "`*-4-8`" in row[0])
    only_pruned = ("random", "magnitude", "wanda", "sparsegpt", "dsnot", "alps")
    names = [name for name, recipe in RECIPES.items() if recipe.method in only_pruned]
    return printed | dict.fromkeys(names, pruned)


def test_there_is_a_section_for_every_method_and_for_no_other():
    assert set(SECTIONS) == set(METHODS)
    for name, section in SECTIONS.items():
        assert f"({METHODS[name].year}" in section or f", {METHODS[name].year})" in section


def test_every_recipe_is_named_in_the_section_of_its_method():
    for name, recipe in RECIPES.items():
        assert f"`{name}`" in SECTIONS[recipe.method], name


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_section_is_one_that_the_method_takes(name):
    a_recipe = next(recipe for recipe in RECIPES.values() if recipe.method == name)
    for key, text in SETTING.findall(SECTIONS[name]):
        if key in METHODS[name].Opt.model_fields:
            make_method(name, {key: yaml.safe_load(text)})
        else:
            assert "." in key or key == "nm", f"{name} has no option {key}"
            a_recipe.override([f"{key}={text}"])


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_shown_with_its_default(name):
    model = METHODS[name].Opt
    parents = [m.Opt for m in METHODS.values() if m.Opt is not model and issubclass(model, m.Opt)]
    inherited = {
        field: default
        for parent in parents
        for field, default in parent().model_dump(mode="json").items()
    }
    _, colon, options = SECTIONS[name].partition("\nOptions: ")
    assert colon
    shown = SETTING.findall(options.partition("\nRecipe")[0])
    for field, default in model().model_dump(mode="json").items():
        if inherited.get(field, ...) != default:
            assert default in [yaml.safe_load(text) for key, text in shown if key == field], field


def test_settings_outside_the_sections_mean_something():
    rest = TEXT
    for section in SECTIONS.values():
        rest = rest.replace(section, "")
    options = {field for method in METHODS.values() for field in method.Opt.model_fields}
    for key, text in SETTING.findall(rest):
        if key not in options | {"option"}:
            load_recipe("pbs2p-4-8").override([f"{key}={text}"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_bits_is_that_of_the_format(name):
    report = recipe_bits(RECIPES[name])
    assert table()[name] == (f"{report.paper_bits:.3f}", f"{report.stored_bits:.3f}")
