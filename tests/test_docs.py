"""docs/methods.md names what there is, and nothing that there is not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from subbit.methods import METHODS, LinearStats, Settings, make_method
from subbit.packed import bit_report, pack
from subbit.recipe import list_recipes, load_recipe

TEXT = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
RECIPES = {recipe.name: recipe for recipe in list_recipes()}
SETTING = re.compile(r"`([a-z_.]+)=([^`]+)`")
SIZE, SALIENT = 4096, 410  # of the linear of the table of bits: 10 % of its columns are salient


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
    recipe = RECIPES[name]
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 128, generator=generator)
    X = torch.randn(256, 128, generator=generator) * torch.linspace(0.2, 2, 128)
    # the small linear tells which fields there are, not how well the method does
    quick = {"sweeps": 0, "passes": 0, "iterations": 1, "cycles": 1, "candidates": 2}
    fields = METHODS[recipe.method].Opt.model_fields
    options = recipe.options | {k: v for k, v in quick.items() if k in fields}
    settings = Settings(recipe.blocksize, recipe.percdamp)
    stats = LinearStats(X.T @ X, len(X), mean=X.mean(0))
    linear = make_method(recipe.method, options, settings).compress(W, stats, recipe.nm)
    layout, _ = pack(linear)
    larger = {"rows": SIZE, "cols": SIZE}
    salient = 0
    if getattr(layout, "salient_elements", None) is not None:
        larger["salient_elements"] = round(recipe.options["salient_share"] * SIZE * SIZE)
        larger["salient_group_size"] = SIZE
    elif getattr(layout, "salient", None) is not None:
        salient = SALIENT
    report = bit_report(replace(layout, **larger), salient)
    assert table()[name] == (f"{report.paper_bits:.3f}", f"{report.stored_bits:.3f}")
