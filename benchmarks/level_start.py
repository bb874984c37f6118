"""Does an exact start of the free levels pay? Loss of pbs2p-plus on nine linears, both ways.

    python benchmarks/level_start.py --model MODEL [--nsamples 8] [--recipe pbs2p-plus-6-8]

The recipe starts its levels with Lloyd's algorithm from quantiles. The exact optimum of weighted
k-means in one dimension is a dynamic programme over the sorted weights; here it takes the place of
that start, before and after joint solves and descent have had their say.
"""

import argparse
from unittest import mock

import torch
from torch import Tensor

from linear_losses import collect
from subbit.binarize import levels as lloyd
from subbit.methods import Settings, make_method
from subbit.methods import pbs2p_plus as method_module
from subbit.recipe import load_recipe

_ROWS = 64  # at a time: the table of costs is (rows, b, b)


def exact_levels(W: Tensor, keep: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `fit_levels`, by dynamic programming: no other levels have a smaller squared error."""
    parts = [_exact(w, k, count, weight) for w, k in zip(W.split(_ROWS), keep.split(_ROWS))]
    levels = torch.cat(parts)
    return (lloyd._nearest(W, levels) + 1) * keep, levels


def _exact(W: Tensor, keep: Tensor, count: int, weight: Tensor) -> Tensor:
    order = torch.where(keep, W, torch.inf).argsort(1)
    w, mass = W.gather(1, order).double(), (keep * weight).gather(1, order).double()
    rows, b = w.shape
    sums = [torch.nn.functional.pad((mass * w**p).cumsum(1), (1, 0)) for p in range(3)]
    m, first, second = (s[:, None, 1:] - s[:, :-1, None] for s in sums)  # [i, j]: weights i..j
    cost = (second - first.square() / m.clamp_min(1e-30)).clamp_min(0)
    cost = cost.masked_fill(torch.ones(b, b, dtype=torch.bool).tril(-1), torch.inf)
    best, cuts = cost[:, 0], []  # best[j]: of the weights up to j
    for _ in range(count - 1):
        total = torch.nn.functional.pad(best, (1, 0))[:, :b, None] + cost
        best, cut = total.min(1)
        cuts.append(cut)
    levels, end = W.new_zeros(rows, count), torch.full((rows, 1), b - 1)
    for k in reversed(range(count)):
        start = cuts[k - 1].gather(1, end) if k else torch.zeros_like(end)
        parts = [s.gather(1, end + 1) - s.gather(1, start) for s in sums[:2]]
        levels[:, k : k + 1] = (parts[1] / parts[0].clamp_min(1e-30)).float()
        end = (start - 1).clamp_min(0)
    return levels


def main() -> None:
    """Print a line for each start, before and after refinement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", default="pbs2p-plus-6-8")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems, recipe = collect(args), load_recipe(args.recipe)
    settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
    for changes in ({"sweeps": 0, "passes": 0}, {"passes": 0}, {}):
        method = make_method(recipe.method, recipe.options | changes, settings)
        for name, start in (("lloyd", lloyd.fit_levels), ("exact", exact_levels)):
            with mock.patch.object(method_module, "fit_levels", start):
                found = [method.compress(W, s, recipe.nm).record["loss"] for W, s, _ in problems]
            print(
                f"{sum(found) / len(found):.5f}  {name}  {changes or 'as in the recipe'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
