"""What the exact start of the free levels is worth: loss of pbs2p-plus on nine linears.

    python benchmarks/level_start.py --model MODEL [--nsamples 8] [--recipe RECIPE ...]

Free levels start from the optimum of k-means in one dimension (`fit_levels`). Lloyd's algorithm
from quantiles, a local optimum, takes its place here: before and after joint solves, descent and
passes have had their say.
"""

import argparse
from unittest import mock

import torch
from torch import Tensor

from linear_losses import collect
from subbit.binarize.levels import fit_levels
from subbit.methods import Settings, make_method
from subbit.methods import pbs2p_plus as method_module
from subbit.recipe import load_recipe


def lloyd_levels(W: Tensor, keep: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `fit_levels`, by eight steps of Lloyd's algorithm from quantiles."""
    kept = keep.sum(1, keepdim=True)
    ascending = torch.where(keep, W, torch.inf).sort(1).values
    middle = (torch.arange(count) + 0.5) / count
    position = torch.minimum((middle * kept).long(), (kept - 1).clamp_min(0))
    levels = ascending.gather(1, position).masked_fill(kept == 0, 0.0)
    mass = keep * weight
    for _ in range(8):
        nearest = (W[..., None] - levels[:, None]).abs().argmin(-1)
        total = torch.zeros_like(levels).scatter_add_(1, nearest, mass)
        pull = torch.zeros_like(levels).scatter_add_(1, nearest, mass * W)
        levels = torch.where(total > 0, pull / total.clamp_min(1e-30), levels)
    return ((W[..., None] - levels[:, None]).abs().argmin(-1) + 1) * keep, levels


def main() -> None:
    """Print a line for each recipe, stage and start."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--recipe", nargs="+", default=["pbs2p-plus-6-8", "pbs2p-plus-4-8", "pbs2p-plus-8-levels"]
    )
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--nsamples", type=int, nargs=1, default=[8])
    parser.add_argument("--held-out", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (problems,) = collect(args).values()
    for name in args.recipe:
        recipe = load_recipe(name)
        settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
        for changes in ({"sweeps": 0, "passes": 0}, {"passes": 0}, {}):
            method = make_method(recipe.method, recipe.options | changes, settings)
            for start, fit in (("lloyd", lloyd_levels), ("exact", fit_levels)):
                with mock.patch.object(method_module, "fit_levels", fit):
                    found = [
                        method.compress(W, stats, recipe.nm).record["loss"]
                        for W, stats, _ in problems
                    ]
                mean = sum(found) / len(found)
                print(f"{mean:.5f}  {start}  {name}  {changes or 'as it is'}", flush=True)


if __name__ == "__main__":
    main()
