"""The kernels against memory and against torch: ratios within one run.

    python benchmarks/kernel.py                       the shapes of LLaMA-7B, one and two threads
    python benchmarks/kernel.py --shape 1024x1024 --pool-mb 64 --rounds 3    a quick look

Every call multiplies with another matrix of a pool that is larger than any cache, so that weights
come from memory. Contenders take turns in random order, round after round, and each one's best
time counts: other load on the machine only ever adds. "ceiling" is a loop that only reads as many
bytes as the kernel does, in streams side by side as the kernel reads them; "of ceiling" is its time
over the kernel's. "plain loop" reads as most programs do, from the first byte to the last: some
processors give a core more. The kernel is called as a `PackedLinear` calls it.
"""

import argparse
import json
import random
import time
from collections.abc import Callable

import torch

from subbit.packed.kernels import kernel_name, native, processor
from subbit.packed.kernels.layout import sizes
from subbit.packed.kernels.op import b3_linear_no_grad


def main() -> None:
    """Measure every shape, number of threads and batch that was asked for."""
    args = _arguments()
    print(f"{processor()}; kernel {kernel_name()}, torch {torch.__version__}")
    print(f"pools of {args.pool_mb} MB")
    for shape in args.shape:
        rows, cols = (int(side) for side in shape.split("x"))
        pools = _pools(rows, cols, args.pool_mb << 20, args.salient)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                best = _measure(_contenders(pools, rows, cols, batch), args.rounds, args.seed)
                _report(shape, threads, batch, best, args.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "11008x4096"], help="ROWSxCOLS")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--pool-mb", type=int, default=768, help="bytes of each pool of matrices")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender")
    parser.add_argument("--salient", type=float, default=0.1, help="share of salient columns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser.parse_args()


def _pools(rows: int, cols: int, nbytes: int, salient: float) -> dict[str, torch.Tensor]:
    """Matrices in each form, one after the other; all of a form hold the same weights."""
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, cols, generator=rng)
    forms = {
        "float32": dense,
        "bfloat16": dense.bfloat16(),
        "b3": _random_tiles(rows, cols, 3, rng),
        "b2": _random_tiles(rows, cols, 2, rng),
    }
    pools = {}
    for name, form in forms.items():
        count = max(2, nbytes // (form.numel() * form.element_size()))
        pools[name] = form.unsqueeze(0).repeat(count, *[1] * form.dim())
    width = sizes(rows, cols)[1]
    pools["b3 flags"] = 8 * (torch.rand(width, generator=rng) < salient).byte()
    pools["b2 flags"] = torch.zeros(width, dtype=torch.uint8)
    return pools


def _random_tiles(rows: int, cols: int, bits: int, rng: torch.Generator) -> torch.Tensor:
    """Random codes and levels, scales of 1: what the bytes are does not change the time."""
    if cols % 128:
        raise SystemExit(f"--shape {rows}x{cols}: columns must be a multiple of 128")
    count = sizes(rows, cols, bits)[0]
    tiles = torch.randint(0, 256, (count,), generator=rng, dtype=torch.uint8)
    codes = 256 * bits  # bytes of a unit before its 16 records, whose last two are the scale
    records = tiles.view(-1, sizes(16, 128, bits)[0])[:, codes:].unflatten(1, (16, -1))
    records[..., -2], records[..., -1] = 0x80, 0x3F
    return tiles


def _contenders(
    pools: dict[str, torch.Tensor], rows: int, cols: int, batch: int
) -> dict[str, Callable[[], object]]:
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(1))
    half = x.bfloat16()
    turns = dict.fromkeys(pools, 0)

    def take(pool: str) -> torch.Tensor:
        turns[pool] = (turns[pool] + 1) % len(pools[pool])
        return pools[pool][turns[pool]]

    def ours(pool: str, x: torch.Tensor, planes: int) -> Callable[[], object]:
        flags = pools[f"{pool} flags"]
        return lambda: b3_linear_no_grad(x, take(pool), flags, rows, cols, planes)

    def dense(x: torch.Tensor, pool: str) -> Callable[[], object]:
        return lambda: torch.nn.functional.linear(x, take(pool))

    def reading(pool: str, streams: bool) -> Callable[[], object]:
        return lambda: native.read(take(pool), streams)

    found = {
        "b3 float32": ours("b3", x, 2),
        "b3 bfloat16": ours("b3", half, 2),
        "b2 float32": ours("b2", x, 2),
        "b2 bfloat16": ours("b2", half, 2),
        "torch float32": dense(x, "float32"),
        "torch bfloat16": dense(half, "bfloat16"),
    }
    if batch <= 16:
        found["b3 a8"] = ours("b3", x, 1)
        found["b2 a8"] = ours("b2", x, 1)
        for form in ("b3", "b2"):
            found[f"{form} ceiling"] = reading(form, True)
            found[f"{form} plain loop"] = reading(form, False)
    return found


def _measure(
    contenders: dict[str, Callable[[], object]], rounds: int, seed: int
) -> dict[str, float]:
    """Best time of each contender, milliseconds a call."""
    order, rng = list(contenders), random.Random(seed)
    best = dict.fromkeys(order, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                for _ in range(4):  # the first call after another contender finds cold code
                    start = time.perf_counter()
                    contenders[name]()
                    took = 1e3 * (time.perf_counter() - start)
                    best[name] = min(best[name], took)
                    if took > 50:
                        break
    return best


def _report(shape: str, threads: int, batch: int, best: dict[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"shape": shape, "threads": threads, "batch": batch, "ms": best}))
        return
    print(f"{shape}, {threads} thread(s), batch {batch}")
    for name, took in best.items():
        ratios = ""
        form, _, what = name.partition(" ")
        if form in ("b3", "b2") and what not in ("ceiling", "plain loop"):
            ratios = (
                f"{best['torch float32'] / took:6.2f} x float32 "
                f"{best['torch bfloat16'] / took:6.2f} x bfloat16"
            )
            if f"{form} ceiling" in best:
                ratios += (
                    f" {100 * best[f'{form} ceiling'] / took:6.1f} % of ceiling"
                    f" {100 * best[f'{form} plain loop'] / took:6.1f} % of plain loop"
                )
        print(f"  {name:<16} {took:9.3f} ms {ratios}", flush=True)


if __name__ == "__main__":
    main()
