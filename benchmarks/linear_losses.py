"""Mean relative loss of recipes on nine real linears, held out too, and CPU seconds for them.

    python benchmarks/linear_losses.py --model MODEL [--nsamples 8] [--cases CASE ...]

The linears are the query, output and down projections of an early, a middle and a late block of
MODEL; H comes from the original model's activations on the calibration text. A case is a recipe,
optionally with changes: `pbs2p-6-8`, `pbs2p-6-8,spbo=false`, ... Without --cases: the ablation that
leads from pbs2p to pbs2p-plus, and the alternatives of docs/differences.md. A line has the loss on
the calibration text, that on the `--held-out` windows that follow it, and the seconds.
"""

import argparse
import time

import torch

from subbit.linalg import GramAccumulator, relative_loss
from subbit.methods import LinearStats, Settings, make_method
from subbit.model import (
    capture_inputs,
    find_blocks,
    find_linears,
    first_inputs,
    load_model,
    record_calls,
    run_block,
    weight_of,
)
from subbit.recipe import load_recipe
from subbit.text import calibration_windows

_OFF = "codebook=groups,sweeps=0,passes=0,compensation=diagonal,objective=gram"
_STEPS = [
    "pbs2p-{nm},spbo=false",
    "pbs2p-{nm}",
    "pbs2p-plus-{nm}," + _OFF + ",compensation=exact",
    "pbs2p-plus-{nm}," + _OFF + ",compensation=exact,sweeps=3,remask=false",
    "pbs2p-plus-{nm}," + _OFF + ",compensation=exact,objective=schur,sweeps=3,remask=false",
    "pbs2p-plus-{nm}," + _OFF + ",compensation=exact,objective=schur,sweeps=6,remask=false",
    "pbs2p-plus-{nm},remask=false,passes=0",
    "pbs2p-plus-{nm},passes=0",
    "pbs2p-plus-{nm}",
]
_CHOICES = [
    "mask_aware=false",
    "target=full",
    "groups_from=full",
    "hessian_score=printed",
    "hessian_score=obs",
    "tau=1",
    "salient=false",
    "split_points=1",
    "fine_metric=wanda",
    "fine_metric=magnitude",
    "fine_metric=si",
    "fine_metric=random",
]


Problem = tuple[torch.Tensor, LinearStats, torch.Tensor]


def collect(args: argparse.Namespace) -> list[Problem]:
    """Weights, statistics and held-out H of the nine linears."""
    loaded = load_model(args.model)
    model = loaded.model
    windows = calibration_windows(
        args.calibration,
        loaded.tokenizer,
        model,
        nsamples=args.nsamples + args.held_out,
        seqlen=args.seqlen,
    ).tokens
    blocks = find_blocks(model)
    calls, hidden = record_calls(model, blocks, windows), first_inputs(model, blocks, windows)
    count = len(blocks.modules)
    wanted = {1, count // 2 - 1, count - 2}
    found = []
    for i, (block, call) in enumerate(zip(blocks.modules, calls)):
        if i in wanted:
            linears = find_linears(block)
            chosen = {
                n: m for n, m in linears.items() if n.endswith(("q_proj", "o_proj", "down_proj"))
            }
            seen, others = (
                capture_inputs(block, part, call, chosen, GramAccumulator)
                for part in (hidden[: args.nsamples], hidden[args.nsamples :])
            )
            for name, gram in seen.items():
                stats = LinearStats(gram.H, gram.tokens, f"{blocks.name(i)}.{name}")
                found.append((weight_of(linears[name]).float(), stats, others[name].H))
        if i < max(wanted):
            run_block(block, hidden, call, out=hidden)
    return found


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=4, help="windows after these, >= 1")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = args.cases or [
        *(step.format(nm=nm) for nm in ("6-8", "4-8") for step in _STEPS),
        *(f"pbs2p-6-8,{choice}" for choice in _CHOICES),
    ]
    problems = collect(args)
    for case in cases:
        name, *changes = case.split(",")
        recipe = load_recipe(name).override(changes)
        settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
        method = make_method(recipe.method, recipe.options, settings)
        losses, held_out, seconds = [], [], 0.0
        for W, stats, H in problems:
            begun = time.process_time()
            result = method.compress(W, stats, recipe.nm)
            seconds += time.process_time() - begun
            losses.append(result.record["loss"])
            held_out.append(relative_loss(W, result.dequantize(), H))
        means = sum(losses) / len(losses), sum(held_out) / len(held_out)
        print(f"{means[0]:.4f} {means[1]:.4f} {seconds:7.1f} s  {case}", flush=True)


if __name__ == "__main__":
    main()
