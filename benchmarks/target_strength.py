"""How far every linear should go towards the original model's outputs, by held-out windows.

    subbit compress MODEL --recipe pbs2p-plus-4-8 --set calibration.nsamples=8 --out PACKED
    subbit export PACKED --dense DIR
    python benchmarks/target_strength.py --model MODEL --dense DIR [--nsamples 8] [--held-out 4]

DIR is MODEL with its linears compressed, one after the other, on the first `--nsamples` windows.
With `asymmetry.strength` b a linear's target is `W + b shift`, and W + shift predicts best what the
original model puts out (`subbit.linalg.shifted_target`). What is left of its error is a parabola
in b. For each damping of the shift and kind of linear a line has, as means over blocks: the b of
the least error on the calibration windows, that on the windows that follow, what is left there on
these, as a share of the error at b = 0, and what is left at each `--strength`.
"""

import argparse
from collections.abc import Iterator
from statistics import mean

import torch
from torch import Tensor

from subbit.linalg import PairAccumulator, error_energy, shifted_target
from subbit.model import (
    find_blocks,
    find_linears,
    first_inputs,
    load_model,
    look_at_windows,
    record_calls,
    weight_of,
    wiring,
)
from subbit.text import calibration_windows

FIRST_TOKEN = 20.0  # as in the recipes of pbs2p-plus


class Gap:
    """What linears that share an input see, and how far their outputs are from the original's."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.pair = PairAccumulator(next(iter(weights.values())).shape[1])
        self.errors = dict.fromkeys(weights, 0.0)

    def add(self, x: Tensor, original: Tensor, lost: Tensor | None) -> None:
        """Add a window: inputs, the original model's, and what its hidden states have lost."""
        count = torch.ones(len(x))
        count[0] = FIRST_TOKEN
        self.pair.add_pair(x, original, lost, count)
        for name, W in self.weights.items():
            off = (original.float() - x.float()) @ W.T
            off = off if lost is None else off + lost
            self.errors[name] += float((off.square().sum(-1) * count).sum(dtype=torch.float64))

    def parabola(self, name: str, shift: Tensor) -> tuple[float, float]:
        """What b and b^2 add to the error of `W + b shift`, as shares of it at b = 0."""
        slope = -2 * float((shift * self.pair.pull(self.weights[name])).sum(dtype=torch.float64))
        return slope / self.errors[name], error_energy(shift, self.pair.H) / self.errors[name]


def look(args: argparse.Namespace) -> Iterator[tuple[Gap, Gap]]:
    """Of linears that share an input: gaps on the calibration windows and on the others."""
    loaded, compressed = load_model(args.model), load_model(args.dense)
    tokens = calibration_windows(
        args.calibration,
        loaded.tokenizer,
        loaded.model,
        nsamples=args.nsamples + args.held_out,
        seqlen=args.seqlen,
    ).tokens
    ours, theirs = find_blocks(compressed.model), find_blocks(loaded.model)
    calls = record_calls(loaded.model, theirs, tokens)
    hidden = first_inputs(loaded.model, theirs, tokens)
    originals = hidden.clone()
    for block, original, call in zip(ours.modules, theirs.modules, calls, strict=True):
        weights = {n: weight_of(m).float() for n, m in find_linears(original).items()}
        found = wiring(original, originals[:1], call, find_linears(original))
        leaders = [group[0] for group in found.groups]
        gaps = [
            tuple(Gap({name: weights[name] for name in group}) for _ in range(2))
            for group in found.groups
        ]
        looks = zip(
            look_at_windows(block, hidden, call, leaders, found.writers, whole=True),
            look_at_windows(original, originals, call, leaders, found.writers, whole=True),
        )
        for n, (here, there) in enumerate(looks):
            for name, pair in zip(leaders, gaps):
                lost = None
                if name in found.writers:
                    lost = there.before[name].float() - here.before[name].float()
                pair[n >= args.nsamples].add(here.inputs[name], there.inputs[name], lost)
            hidden[n], originals[n] = here.out[0], there.out[0]
        yield from gaps


def lines(args: argparse.Namespace) -> dict[tuple[float, str], list[list[float]]]:
    """By damping and linear, what `main` prints the means of, a row for each block."""
    found: dict[tuple[float, str], list[list[float]]] = {}
    for seen, unseen in look(args):
        for name, W in seen.weights.items():
            if not unseen.errors[name]:  # nothing before it is compressed
                continue
            for percdamp in args.percdamp:
                shift = shifted_target(W, seen.pair, 1.0, percdamp) - W
                (slope, bend), (slope_out, bend_out) = (
                    gap.parabola(name, shift) for gap in (seen, unseen)
                )
                best = -slope_out / bend_out / 2
                row = [-slope / bend / 2, best]
                row += [1 + b * slope_out + b * b * bend_out for b in (best, *args.strength)]
                found.setdefault((percdamp, name), []).append(row)
    return found


def main() -> None:
    """Print a line for each damping and kind of linear."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--percdamp", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--strength", type=float, nargs="+", default=[0.3, 0.5, 1.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(lines(args).items())
    print("percdamp  best b: seen  held out  left there  at", *args.strength)
    for (percdamp, name), rows in found:
        seen, best, *left = (mean(column) for column in zip(*rows))
        shares = "  ".join(f"{share:.3f}" for share in left)
        print(f"{percdamp:8}  {seen:12.3f}  {best:8.3f}  {shares}  {name}")


if __name__ == "__main__":
    main()
