"""A study as a figure: perplexity against stored bits, drawn with matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from subbit.errors import StudyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "front"]

_SIZE, _DPI = (13, 6), 110
_MARKERS = "osD^v<>"
_NEAR = 4.5  # the panel on the right goes up to so many times the original's perplexity
_PLACES = [  # of a name beside its point: offset in points, alignment
    (dx, dy, side)
    for dy in (4, -9, 13, -18)
    for dx, side in ((6, "left"), (-6, "right"))
]  # fmt: skip


class _Point(NamedTuple):
    name: str
    family: str
    bits: float
    perplexity: float


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of `(bits, perplexity)` those that no other beats in both, by ascending bits."""
    best: list[tuple[float, float]] = []
    for bits, perplexity in sorted(points):
        if not best or perplexity < best[-1][1]:
            best.append((bits, perplexity))
    return best


def draw(title: str, records: list[dict[str, Any]], path: Path) -> None:
    """Draw WikiText-2 perplexity (logarithmic) against stored bits a weight into a PNG file.

    Where the original is among the records and some cells come near it, these are drawn once more,
    larger, in a panel of their own.

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
        from matplotlib.ticker import LogFormatter
    except ImportError:
        raise StudyError(
            "the table is written, but the figure needs matplotlib: pip install matplotlib, then "
            "run the same command again"
        ) from None
    originals = [r["wikitext2"]["perplexity"] for r in records if "total" not in r]
    originals = [value for value in originals if value is not None]  # infinite
    points = [_point(record) for record in records if "total" in record]
    points = [point for point in points if point.perplexity is not None]  # infinite
    near = [p for p in points if originals and p.perplexity <= _NEAR * min(originals)]
    panels = [points, near] if 0 < len(near) < len(points) else [points]
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    families = sorted({point.family for point in points})
    for panel, shown in zip(axes, panels, strict=True):
        _scatter(panel, shown, families, originals)
        panel.yaxis.set_major_formatter(LogFormatter())  # 30, not 3 x 10^1
        panel.yaxis.set_minor_formatter(LogFormatter())
    axes[0].set(title=title)
    if len(panels) == 2:
        axes[1].set(title=f"up to {_NEAR} times the original's perplexity, enlarged")
    axes[0].legend()
    named = [[p for p in points if p not in near], near] if len(panels) == 2 else panels
    for panel, shown in zip(axes, named, strict=True):
        _name(figure, panel, shown)
    canvas.print_png(path, metadata={"Software": None})


def _point(record: dict[str, Any]) -> _Point:
    cell = record["cell"]
    bits, perplexity = record["total"]["stored_bits"], record["wikitext2"]["perplexity"]
    return _Point(cell["name"], _family(cell["recipe"]), bits, perplexity)


def _scatter(
    axes: "Axes", points: list[_Point], families: list[str], originals: list[float]
) -> None:
    for perplexity in originals:
        axes.axhline(perplexity, color="0.6", linestyle=":", label="original, 16 bits")
    for i, family in enumerate(families):
        own = [(p.bits, p.perplexity) for p in points if p.family == family]
        if own:
            look = {"marker": _MARKERS[i % len(_MARKERS)], "color": f"C{i}"}
            axes.scatter(*zip(*own, strict=True), label=family, zorder=3, **look)
    best = front([(p.bits, p.perplexity) for p in points])
    axes.plot(*zip(*best, strict=True), color="0.7", zorder=1, label="nothing better in both")
    axes.set(xlabel="stored bits a weight", ylabel="perplexity, WikiText-2", yscale="log")
    axes.margins(x=0.18, y=0.1)  # room for the names
    axes.grid(visible=True, which="both", alpha=0.25)


def _name(figure: "Figure", axes: "Axes", points: list[_Point]) -> None:
    """Write the points' names where they cover neither each other nor a point, if there is room."""
    figure.draw_without_rendering()  # settles where everything is
    taken = [
        (x - 4, y - 4, x + 4, y + 4)
        for x, y in (axes.transData.transform((p.bits, p.perplexity)) for p in points)
    ]
    for point in sorted(points, key=lambda p: (p.bits, -p.perplexity)):
        for dx, dy, side in [*_PLACES, _PLACES[0]]:  # the first one again if none is free
            text = axes.annotate(
                point.name,
                (point.bits, point.perplexity),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=side,
                fontsize=8,
            )
            box = text.get_window_extent().extents
            if not any(_overlap(box, other) for other in taken):
                break
            text.remove()
        else:
            axes.add_artist(text)
        taken.append(tuple(box))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _family(recipe: str) -> str:
    """What a point is drawn as: the name of the recipe up to its first number."""
    words: list[str] = []
    for word in recipe.split("-"):
        if word[:1].isdigit() or word in ("binary", "ternary"):
            break
        words.append(word)
    return "-".join(words)
