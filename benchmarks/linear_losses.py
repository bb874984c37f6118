"""Mean relative loss of recipes on nine real linears, held out too, and CPU seconds for them.

    python benchmarks/linear_losses.py --model MODEL [--nsamples 8 ...] [--cases CASE ...]

The linears are the query, output and down projections of an early, a middle and a late block of
MODEL; H comes from the original model's activations on the calibration text. A case is a recipe,
optionally with changes: `pbs2p-6-8`, `pbs2p-6-8,spbo=false`, ... Without --cases: the ablation that
leads from pbs2p to pbs2p-plus, and the alternatives of docs/differences.md. A line has the loss on
the calibration text, that on the `--held-out` windows that follow it, and the seconds. Of several
`--nsamples` each has its lines, and the held-out windows follow the most.
"""

import argparse
import os
import time
from dataclasses import replace

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


def collect(args: argparse.Namespace) -> dict[int, list[Problem]]:
    """Weights, statistics and held-out H of the nine linears, by number of windows."""
    most = max(args.nsamples)
    loaded = load_model(args.model)
    model = loaded.model
    windows = calibration_windows(
        args.calibration,
        loaded.tokenizer,
        model,
        nsamples=most + args.held_out,
        seqlen=args.seqlen,
    ).tokens
    blocks = find_blocks(model)
    calls, hidden = record_calls(model, blocks, windows), first_inputs(model, blocks, windows)
    count = len(blocks.modules)
    wanted = {1, count // 2 - 1, count - 2}
    found: dict[int, list[Problem]] = {count: [] for count in args.nsamples}
    for i, (block, call) in enumerate(zip(blocks.modules, calls)):
        if i in wanted:
            linears = find_linears(block)
            chosen = {
                n: m for n, m in linears.items() if n.endswith(("q_proj", "o_proj", "down_proj"))
            }
            others = capture_inputs(block, hidden[most:], call, chosen, GramAccumulator)
            for nsamples, problems in found.items():
                seen = capture_inputs(block, hidden[:nsamples], call, chosen, GramAccumulator)
                for name, gram in seen.items():
                    stats = LinearStats(gram.H, gram.tokens, f"{blocks.name(i)}.{name}")
                    problems.append((weight_of(linears[name]).float(), stats, others[name].H))
        if i < max(wanted):
            run_block(block, hidden, call, out=hidden)
    return found


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--nsamples", type=int, nargs="+", default=[8])
    parser.add_argument("--held-out", type=int, default=4, help="windows after these, >= 1")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float64", action="store_true", help="float64 in the place of float32")
    parser.add_argument("--cases", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = args.cases or [
        *(step.format(nm=nm) for nm in ("6-8", "4-8") for step in _STEPS),
        *(f"pbs2p-6-8,{choice}" for choice in _CHOICES),
    ]
    found = collect(args)
    if args.float64:
        in_float64()
    for nsamples, problems in found.items():
        if len(found) > 1:
            print(f"{nsamples} windows", flush=True)
        for case in cases:
            losses, seconds = measure(case, problems)
            print(f"{losses[0]:.4f} {losses[1]:.4f} {seconds:7.1f} s  {case}", flush=True)


def in_float64() -> None:
    """From now on everything is float64 that would be float32, but for what is stored."""
    os.environ["SUBBIT_DESCENT"] = "off"  # the compiled steps are float32
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def measure(case: str, problems: list[Problem]) -> tuple[tuple[float, float], float]:
    """Mean losses on the calibration text and on the held-out windows; CPU seconds."""
    name, *changes = case.split(",")
    recipe = load_recipe(name).override(changes)
    settings = Settings(recipe.blocksize, recipe.percdamp, levels=recipe.levels)
    method = make_method(recipe.method, recipe.options, settings)
    losses, held_out, seconds = [], [], 0.0
    for W, stats, H in problems:
        W, H, stats = W.float(), H.float(), replace(stats, H=stats.H.float())  # or --float64
        begun = time.process_time()
        result = method.compress(W, stats, recipe.nm)
        seconds += time.process_time() - begun
        losses.append(result.record["loss"])
        held_out.append(relative_loss(W, result.dequantize(), H))
    return (sum(losses) / len(losses), sum(held_out) / len(held_out)), seconds


if __name__ == "__main__":
    main()
