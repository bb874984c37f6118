"""Tables and sums on the terminal."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = [
    "bench_in_words",
    "bench_tables",
    "bits_in_words",
    "linears_table",
    "number",
    "show",
    "span",
    "table",
]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> Table:
    """Return a table of plain text whose last `right` columns stand flush right."""
    made = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        flush = index >= len(columns) - right
        made.add_column(column, justify="right" if flush else "left", no_wrap=flush)
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def show(made: Table) -> None:
    """Print a table on stdout, uncut where stdout is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        unbounded = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, unbounded, made).maximum)
    console.print(made)


def number(value: float | None, spell: Callable[[float], str]) -> str:
    """Return `spell(value)`, or a dash for an unknown value."""
    return "–" if value is None else spell(value)


def span(values: Sequence[float]) -> str:
    """Return the smallest and the largest of some numbers, or the one that there is."""
    ends = dict.fromkeys(f"{end(values):.3f}" for end in (min, max))
    return "–".join(ends)


def linears_table(linears: Iterable[dict[str, Any]]) -> Table:
    """Return the table of `subbit inspect`: one row per entry of `inspect_folder()["linears"]`."""
    columns = ("linear", "shape", "N:M", "loss", "salient", "damping")
    rows = [
        (
            linear["name"],
            f"{linear['shape'][0]} x {linear['shape'][1]}",
            "–" if linear["nm"] is None else f"{linear['nm'][0]}:{linear['nm'][1]}",
            number(linear["loss"], "{:.4f}".format),
            number(linear["salient_share"], "{:.1%}".format),
            number(linear["damping"], "{:g}".format),
            number(linear["paper_bits"], "{:.3f}".format),
            number(linear["stored_bits"], "{:.3f}".format),
            f"{linear['bytes']:,}",
        )
        for linear in linears
    ]
    return table((*columns, "paper bits", "stored bits", "bytes"), rows, right=8)


def bits_in_words(total: dict[str, Any]) -> str:
    """Return `inspect_folder()["total"]` as one line: both bit-widths and the size of the files."""
    bits = "{:.3f}".format
    return (
        f"{number(total['paper_bits'], bits)} paper bits beside "
        f"{number(total['stored_bits'], bits)} stored bits per compressed weight; the files hold "
        f"{total['file_bytes']:,} bytes, {number(total['file_bits_per_parameter'], bits)} bits "
        f"per parameter ({number(total['file_bits_without_embeddings'], bits)} without embeddings)"
    )


def bench_tables(found: dict[str, Any], name: str) -> list[Table]:
    """Return the tables of `subbit bench`: models by test, then linears by shape."""
    rows = [
        (
            f"{name} {model['model']}",
            f"{model['bytes'] / 2**20:.1f} MiB",
            f"{model['parameters'] / 1e6:.2f} M",
            f"{model['backend']} {model['dtype']}",
            str(found["threads"]),
            f"{test}{model[key]['tokens']}",
            f"{model[key]['mean']:.2f} ± {model[key]['sd']:.2f}",
        )
        for model in found["models"]
        for test, key in (("pp", "prompt"), ("tg", "decode"))
    ]
    columns = ("model", "size", "params", "backend", "threads", "test", "t/s")
    return [table(columns, rows, right=6), _bench_linears(found)]


def _bench_linears(found: dict[str, Any]) -> Table:
    """One row a shape: milliseconds of one vector, and the first model's share of the bandwidth."""
    contenders = list(found["linears"][0]["ms"])
    rows = []
    for linear in found["linears"]:
        speed = linear["bytes"] / linear["ms"][contenders[0]] * 1e3
        rows.append(
            (
                "{} x {}".format(*linear["shape"]),
                str(linear["count"]),
                *(f"{linear['ms'][contender]:.4f}" for contender in contenders),
                f"{linear['bytes']:,}",
                f"{speed / 1e9:.1f}",
                number(found["read_bandwidth"], lambda most, speed=speed: f"{speed / most:.0%}"),
            )
        )
    columns = ("linear", "count", *(f"ms {contender}" for contender in contenders))
    return table((*columns, "bytes read", "GB/s", "of read"), rows, right=len(columns) + 2)


def bench_in_words(found: dict[str, Any]) -> str:
    """Return what the tables of `subbit bench` leave out, some lines of text."""
    most = found["read_bandwidth"]
    reading = number(most, lambda b: f"{b / 1e9:.1f} GB/s")
    lines = [f"{found['processor']}; reading memory alone: {reading}"]
    for model in found["models"]:
        share = number(most, lambda b, model=model: f", {model['bandwidth'] / b:.0%} of reading")
        lines.append(
            f"{model['model']} {model['dtype']}: {model['token_bytes'] / 1e6:.1f} MB read a token, "
            f"{model['bandwidth'] / 1e9:.2f} GB/s{share}"
        )
    tokens = found["tokens"]
    apart = f"; where they part, its logits are {tokens['gap']:.1g} apart" if tokens["gap"] else ""
    lines.append(
        f"the same {tokens['new_tokens']} greedy tokens as the reference after {tokens['same']} of "
        f"{tokens['prompts']} prompts (float32){apart}"
    )
    return "\n".join(lines)
