"""A study as a table: Markdown, from the records of its cells."""

from typing import Any

from subbit.study.reference import published_figures

__all__ = ["markdown"]

_HEAD = (
    "cell", "changes", "paper bits", "stored bits", "file, MB", "WikiText-2", "C4", "mean loss",
    "minutes", "peak GiB",
)  # fmt: skip
_PUBLISHED = ("published code: WikiText-2", "published code: C4", "published code: loss")
_MARK = "†"


def markdown(title: str, records: list[dict[str, Any]], beside_published: bool = False) -> str:
    """The table of a study; perplexities with their standard errors.

    Args:
        title: above the table.
        records: of the cells, at least one.
        beside_published: add what the authors' published code gave.
    """
    vocabulary = min((r["vocabulary"] for r in records if "vocabulary" in r), default=None)
    head = (*_HEAD, *_PUBLISHED) if beside_published else _HEAD
    rows = [_row(record, vocabulary) for record in records]
    if beside_published:
        published = [_published(record["cell"]["name"], vocabulary) for record in records]
        rows = [(*row, *more) for row, more in zip(rows, published, strict=True)]
    lines = [f"# {title}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", _protocol(records)]
    if any(_MARK in cell for row in rows for cell in row):
        lines += [
            "",
            f"{_MARK} Above {vocabulary}, the size of the vocabulary, a perplexity is worse than "
            "guessing and says nothing about order: compare the losses there.",
        ]
    if beside_published:
        lines += [
            "",
            "Published code: what the authors' own code gave on SmolLM2-135M-Instruct under the "
            "same protocol, measured in bfloat16; beside another model it means nothing. Its "
            "loss, like ours, is the mean over the linears of tr(EHE^T) / tr(WHW^T).",
        ]
    return "\n".join(lines) + "\n"


def _protocol(records: list[dict[str, Any]]) -> str:
    protocol = records[0]["protocol"]
    dtypes = " and ".join(sorted({record["dtype"] for record in records if "dtype" in record}))
    model = records[0]["model"] + (f", in {dtypes}" if dtypes else "")
    return (
        f"Model: {model}. Calibration: {protocol['calibration']}, "
        f"{protocol['nsamples']} x {protocol['seqlen']} tokens. Perplexity: first "
        f"{protocol['windows']} windows of {protocol['seqlen']} tokens of WikiText-2 test, and of "
        f"the C4 calibration stream from token {protocol['c4_from']} on (held out). Stored bits "
        "are bytes on disk of the packed linears, the file has embeddings too; minutes are wall "
        "time of the compression on a machine that may have been busy."
    )


def _row(record: dict[str, Any], vocabulary: int | None) -> tuple[str, ...]:
    name, changes = record["cell"]["name"], ", ".join(record["cell"]["overrides"])
    perplexities = [
        _perplexity(record[data]["perplexity"], vocabulary, record[data].get("stderr"))
        for data in ("wikitext2", "c4")
    ]
    if "total" not in record:
        return (name, changes, "16", "16", "", *perplexities, "", "", "")
    total, run = record["total"], record["run"]
    return (
        name,
        changes,
        f"{total['paper_bits']:.3f}",
        f"{total['stored_bits']:.3f}",
        f"{total['file_bytes'] / 1e6:.0f}",
        *perplexities,
        f"{run['mean_loss']:.4f}",
        f"{run['seconds']['total'] / 60:.1f}",
        f"{run['peak_rss_bytes'] / 2**30:.2f}",
    )


def _published(name: str, vocabulary: int | None) -> tuple[str, ...]:
    figures = published_figures().get(name)
    if figures is None:
        return ("", "", "")
    perplexities = [_perplexity(figures[data], vocabulary) for data in ("wikitext2", "c4")]
    loss = figures.get("loss")
    return (*perplexities, "" if loss is None else f"{loss:.4f}")


def _perplexity(value: float | None, vocabulary: int | None, error: float | None = None) -> str:
    if value is None:  # JSON has no infinity
        return f"inf {_MARK}"
    spread = "" if error is None else f" ± {error:.2f}"
    above = vocabulary is not None and value > vocabulary
    return f"{value:.2f}{spread}{' ' + _MARK if above else ''}"
