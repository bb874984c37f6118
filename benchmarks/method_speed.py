"""CPU seconds of every recipe for one linear, one thread; the speed classes of `subbit methods`.

    python benchmarks/method_speed.py [--recipes NAME ...] [--out src/subbit/study/speed.yaml]

Prints a line a recipe, and with --out writes the seconds for a million weights that the package
ships. Gaussian weights and correlated inputs: only `alps` and `dsnot` take longer or shorter on
other values.
"""

import argparse
import time
from pathlib import Path

import torch
import yaml

from compression_stage import problem
from subbit.methods import Settings, make_method
from subbit.packed.kernels import processor
from subbit.recipe import list_recipes

SHAPES = ((576, 576), (1536, 576))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems = [problem(rows, cols, 4096, "cpu") for rows, cols in SHAPES]
    print(f"torch {torch.__version__}, {processor()}, one thread, CPU seconds", flush=True)
    found = {}
    for recipe in list_recipes():
        if args.recipes and recipe.name not in args.recipes:
            continue
        settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
        method = make_method(recipe.method, recipe.options, settings)
        seconds = []
        for W, stats in problems:
            times = []
            for _ in range(args.repeats):
                begun = time.process_time()
                method.compress(W, stats, recipe.nm)
                times.append(time.process_time() - begun)
            seconds.append(min(times))
        each = zip(SHAPES, seconds, strict=True)
        shown = ", ".join(f"{rows} x {cols}: {s:7.3f}" for (rows, cols), s in each)
        million = sum(rows * cols for rows, cols in SHAPES) / 1e6
        found[recipe.name] = round(sum(seconds) / million, 3)
        print(f"{shown}, {found[recipe.name]:7.3f} s a million weights  {recipe.name}", flush=True)
    if args.out:
        head = "# CPU seconds of one thread for a million weights: benchmarks/method_speed.py\n"
        args.out.write_text(head + yaml.safe_dump(found))


if __name__ == "__main__":
    main()
