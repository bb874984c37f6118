"""A study as a figure: perplexity against stored bits, drawn with matplotlib."""

from pathlib import Path
from typing import Any

from subbit.errors import StudyError

__all__ = ["draw", "front"]

_SIZE, _DPI = (9, 6), 130


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of `(bits, perplexity)` those that no other beats in both, by ascending bits."""
    best: list[tuple[float, float]] = []
    for bits, perplexity in sorted(points):
        if not best or perplexity < best[-1][1]:
            best.append((bits, perplexity))
    return best


def draw(title: str, records: list[dict[str, Any]], path: Path) -> None:
    """Draw WikiText-2 perplexity (logarithmic) against stored bits a weight into a PNG file.

    Args:
        title: above the figure.
        records: of the cells; one without packed linears is the original, a line across.
        path: the file to write.

    Raises:
        StudyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise StudyError(
            "the table is written, but the figure needs matplotlib: pip install matplotlib, then "
            "run the same command again"
        ) from None
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        perplexity = record["wikitext2"]["perplexity"]
        if "total" not in record:
            axes.axhline(perplexity, color="0.6", linestyle=":", label="original, 16 bits")
            continue
        point = (record["total"]["stored_bits"], perplexity)
        found.setdefault(_family(record), []).append(point)
        axes.annotate(
            record["cell"]["name"], point, xytext=(5, 4), textcoords="offset points", fontsize=7
        )
    for marker, (family, points) in zip("osD^v<>", sorted(found.items()), strict=False):
        axes.scatter(*zip(*points, strict=True), marker=marker, label=family, zorder=3)
    best = front([point for points in found.values() for point in points])
    axes.plot(*zip(*best, strict=True), color="0.7", zorder=1, label="nothing better in both")
    axes.set(
        title=title, xlabel="stored bits a weight", ylabel="perplexity, WikiText-2", yscale="log"
    )
    axes.margins(x=0.12)  # room for the names
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _family(record: dict[str, Any]) -> str:
    """What a point is drawn as: the name of the recipe up to its first number."""
    words: list[str] = []
    for word in (record["cell"]["recipe"] or "original").split("-"):
        if word[:1].isdigit() or word in ("binary", "ternary"):
            break
        words.append(word)
    return "-".join(words)
