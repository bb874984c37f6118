"""Seconds of the compression stage for one linear, split by step.

    python benchmarks/compression_stage.py [--shapes 4096x4096 11008x4096] [--recipe pbs2p-6-8]

Shapes are rows x columns. Weights are Gaussian, inputs correlated; what the values are does not
change what is computed. With one thread (the default) seconds are CPU seconds of the process, so
that other programs on the machine do not count; with more, wall seconds.
"""

import argparse
import cProfile
import json
import pstats
import time

import torch

from subbit.methods import LinearStats, Settings, make_method
from subbit.packed.kernels import processor
from subbit.recipe import load_recipe

STEPS = {
    "factorize": "damping and Cholesky factor of H",
    "ranks_in_groups": "fine stage: order of pruning",
    "search_salient": "search for salient columns",
    "search_splits": "search for split points",
    "label_groups": "magnitude groups",
    "binarize_part": "plain binarisation",
    "spbo": "SPBO",
    "code_block": "codes and stored parameters",
    "dense": "decoding (error of a block)",
    "compensate": "compensation: one block's update",
    "relative_loss": "loss",
}


def problem(rows: int, cols: int, tokens: int, device: str) -> tuple[torch.Tensor, LinearStats]:
    """A random linear and its statistics."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, cols, generator=generator) * 0.02
    H, total = torch.zeros(cols, cols), torch.zeros(cols)
    for _ in range(0, tokens, 2048):
        X = torch.randn(2048, cols, generator=generator)
        X[:, 1:] += 0.5 * X[:, :-1]
        H += X.T @ X
        total += X.sum(0)
    mean = (total / tokens).to(device)
    return W.to(device), LinearStats(H.to(device), tokens, f"{rows}x{cols}", mean)


def measure(recipe: str, rows: int, cols: int, args: argparse.Namespace) -> dict:
    """Compress one linear `repeats` times; the fastest run, split by step."""
    chosen = load_recipe(recipe).override(args.set)
    settings = Settings(chosen.blocksize, chosen.percdamp, levels=chosen.levels)
    method = make_method(chosen.method, chosen.options, settings)
    W, stats = problem(rows, cols, args.tokens, args.device)
    clock = time.process_time if args.threads == 1 and args.device == "cpu" else time.perf_counter
    best: dict = {}
    for _ in range(args.repeats):
        profile = cProfile.Profile(clock)
        begun = clock()
        result = profile.runcall(method.compress, W, stats, chosen.nm)
        if args.device != "cpu":
            torch.cuda.synchronize()
        total = clock() - begun
        if not best or total < best["seconds"]:
            best = {"seconds": total, "loss": result.record["loss"], "steps": split(profile)}
    shown = {name: round(seconds, 4) for name, seconds in best["steps"].items()}
    shown["everything else"] = round(best["seconds"] - sum(best["steps"].values()), 4)
    return {"shape": f"{rows}x{cols}", "recipe": recipe, **best, "steps": shown}


def split(profile: cProfile.Profile) -> dict[str, float]:
    """Cumulative seconds of the named steps; what one step calls of another counts once."""
    found = dict.fromkeys(STEPS, 0.0)
    for (_, _, function), row in pstats.Stats(profile).stats.items():
        if function in found:
            callers = {name for _, _, name in row[4]}
            nested = sum(times[3] for (_, _, name), times in row[4].items() if name in STEPS)
            found[function] += row[3] - (nested if callers & set(STEPS) else 0.0)
    return found


def main() -> None:
    """Print a table, and JSON lines with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--recipe", nargs="+", default=["pbs2p-6-8"])
    parser.add_argument("--set", nargs="*", default=[], help="key=value changes to the recipe")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device != "cpu" else processor()
    for recipe in args.recipe:
        for shape in args.shapes:
            row = measure(recipe, *map(int, shape.split("x")), args)
            row |= {"threads": args.threads, "device": where, "torch": torch.__version__}
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            print(f"{row['recipe']} {shape}: {row['seconds']:.2f} s, loss {row['loss']:.4f}")
            for name, seconds in row["steps"].items():
                share = seconds / row["seconds"]
                print(f"  {seconds:8.3f} s {share:5.1%}  {STEPS.get(name, name)}", flush=True)


if __name__ == "__main__":
    main()
