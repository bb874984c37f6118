"""A study as a table: Markdown, from the records of its cells."""

from typing import Any

__all__ = ["markdown"]

_HEAD = (
    "cell", "changes", "paper bits", "stored bits", "WikiText-2", "C4", "mean loss", "minutes",
    "peak GiB",
)  # fmt: skip


def markdown(title: str, records: list[dict[str, Any]]) -> str:
    """The table of a study; perplexities with their standard errors."""
    rows = [_row(record) for record in records]
    lines = [f"# {title}", "", "| " + " | ".join(_HEAD) + " |", "| --- " * len(_HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    protocol = records[0]["protocol"]
    lines += [
        "",
        f"Model: {records[0]['model']}. Calibration: {protocol['calibration']}, "
        f"{protocol['nsamples']} x {protocol['seqlen']} tokens. Perplexity: first "
        f"{protocol['windows']} windows of {protocol['seqlen']} tokens of WikiText-2 test, and of "
        f"the C4 calibration stream from token {protocol['c4_from']} on (held out). Stored bits "
        "are bytes on disk of the packed linears; minutes are wall time of the compression on a "
        "machine that may have been busy.",
    ]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    name, changes = record["cell"]["name"], ", ".join(record["cell"]["overrides"])
    perplexities = [_perplexity(record[data]) for data in ("wikitext2", "c4")]
    if "total" not in record:
        return (name, changes, "16", "16", *perplexities, "", "", "")
    total, run = record["total"], record["run"]
    return (
        name,
        changes,
        f"{total['paper_bits']:.3f}",
        f"{total['stored_bits']:.3f}",
        *perplexities,
        f"{run['mean_loss']:.4f}",
        f"{run['seconds']['total'] / 60:.1f}",
        f"{run['peak_rss_bytes'] / 2**30:.2f}",
    )


def _perplexity(measured: dict[str, Any]) -> str:
    error = measured.get("stderr")
    return f"{measured['perplexity']:.2f}" + (f" ± {error:.2f}" if error is not None else "")
