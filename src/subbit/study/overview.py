"""All methods at a glance: bits as the format computes them, and how long they were measured."""

from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml

from subbit.methods import METHODS, LinearStats, Settings, list_methods, make_method
from subbit.packed import BitReport, bit_report, pack
from subbit.recipe import Recipe, list_recipes

__all__ = ["Speed", "measured_speeds", "methods_overview", "recipe_bits"]

SIZE = 4096
SALIENT = 410  # of its columns: 10 %

_QUICK = {"sweeps": 0, "passes": 0, "iterations": 1, "cycles": 1, "candidates": 2}
_MINUTE = 0.06  # seconds a million weights that make a minute for a billion


@dataclass(frozen=True)
class Speed:
    """CPU seconds of one thread for a million weights, the model's own forward passes left out.

    `records/method_speed.txt` holds the measurement, `benchmarks/method_speed.py` repeats it.
    """

    seconds: float

    @property
    def name(self) -> str:
        """How long a billion weights would take: "seconds", "minutes", or "tens of minutes".

        In linears of 576 columns, as measured; with more columns a weight takes longer (at 4096
        `pbs2p-6-8` 1.7 times as long, records/compression_stage.txt).
        """
        if self.seconds < _MINUTE:
            return "seconds"
        return "minutes" if self.seconds < 10 * _MINUTE else "tens of minutes"


def recipe_bits(recipe: Recipe) -> BitReport:
    """Bits of a 4096 x 4096 linear under a recipe, where a tenth of its columns are salient.

    Arithmetic on the packed format: a small linear is compressed and packed, hastily, to see which
    fields there are; no size is written down anywhere.
    """
    generator = torch.Generator().manual_seed(0)
    cols = 256  # two blocks: what a whole row shares shows
    W = torch.randn(8, cols, generator=generator)
    X = torch.randn(2 * cols, cols, generator=generator) * torch.linspace(0.2, 2, cols)
    fields = METHODS[recipe.method].Opt.model_fields
    options = recipe.options | {k: v for k, v in _QUICK.items() if k in fields}
    settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
    stats = LinearStats(X.T @ X, len(X), mean=X.mean(0))
    method = make_method(recipe.method, options, settings)
    linear = method.compress(W, stats, recipe.nm)
    layout, _ = pack(linear)
    larger, salient = {"rows": SIZE, "cols": SIZE}, 0
    if getattr(layout, "salient_elements", None) is not None:
        larger["salient_elements"] = round(method.options.salient_share * SIZE * SIZE)
        larger["salient_group_size"] = SIZE
    elif getattr(layout, "salient", None) is not None:
        salient = SALIENT
    return bit_report(replace(layout, **larger), salient)


@cache
def measured_speeds() -> dict[str, Speed]:
    """Measured speed of every shipped recipe."""
    text = resources.files("subbit.study").joinpath("speed.yaml").read_text(encoding="utf-8")
    return {name: Speed(seconds) for name, seconds in yaml.safe_load(text).items()}


def methods_overview() -> list[dict[str, Any]]:
    """What `subbit methods` prints: `list_methods`, and of every method's recipes bits and speed.

    Returns:
        A dict a method; under "recipes", a dict each with "name", "paper_bits", "stored_bits",
        "seconds_per_million_weights" and "speed" (None where not measured). "packed": whether its
        results go into a packed file, which was tried.
    """
    speeds = measured_speeds()
    found = {method["name"]: method | {"packed": True, "recipes": []} for method in list_methods()}
    for recipe in list_recipes():
        bits, speed = recipe_bits(recipe), speeds.get(recipe.name)
        found[recipe.method]["recipes"].append(
            {
                "name": recipe.name,
                "paper_bits": round(bits.paper_bits, 3),
                "stored_bits": round(bits.stored_bits, 3),
                "seconds_per_million_weights": None if speed is None else speed.seconds,
                "speed": None if speed is None else speed.name,
            }
        )
    return list(found.values())
