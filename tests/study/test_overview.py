"""`subbit methods`: bits are those of the format, speeds are measured ones."""

from pathlib import Path

import pytest

from subbit.methods import METHODS
from subbit.recipe import list_recipes
from subbit.study.overview import Speed, measured_speeds, methods_overview, recipe_bits

RECORD = Path(__file__).parents[2] / "records" / "method_speed.txt"


def test_every_method_with_its_recipes_bits_and_speed():
    found = {method["name"]: method for method in methods_overview()}
    assert set(found) == set(METHODS)
    listed = {recipe["name"] for method in found.values() for recipe in method["recipes"]}
    assert listed == {recipe.name for recipe in list_recipes()}
    for method in found.values():
        assert method["year"] > 2000 and method["paper"] and method["packed"]
        for recipe in method["recipes"]:
            assert 0 < recipe["paper_bits"] < recipe["stored_bits"]
            assert recipe["speed"] in ("seconds", "minutes", "tens of minutes")


def test_bits_follow_the_recipe():
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    assert recipe_bits(recipes["gptq-3"]).paper_bits == 3
    assert recipe_bits(recipes["gptq-3"]).stored_bits == pytest.approx(3 + 19 / 128)
    smaller = recipes["pbs2p-6-8"].override(["blocksize=64"])
    assert recipe_bits(smaller).stored_bits > recipe_bits(recipes["pbs2p-6-8"]).stored_bits


def test_speeds_are_those_of_the_record():
    lines = RECORD.read_text().splitlines()[2:]
    logged = {line.split()[-1]: float(line.split(",")[2].split()[0]) for line in lines}
    assert {name: speed.seconds for name, speed in measured_speeds().items()} == logged
    assert set(logged) == {recipe.name for recipe in list_recipes()}


def test_speed_classes_are_of_a_billion_weights():
    assert [Speed(s).name for s in (0.03, 0.3, 3.0)] == ["seconds", "minutes", "tens of minutes"]
