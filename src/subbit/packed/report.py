"""How many bits a weight takes: the papers' count, the bytes that are stored, and the floor.

Paper bits count signs alone (equation 10 of PBS²P): `(2 r + (1 - r)) N / M` with r the share of
salient columns. Stored bits are 8 x bytes of all fields / weights. The floor is what the same
information takes at least, were every mask, sign and label equally likely.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, lgamma, log, log2

from subbit.codes import LEVEL_KINDS
from subbit.packed.layout import Layout

__all__ = ["BitReport", "ModelBits", "bit_report", "model_bits"]


@dataclass(frozen=True)
class BitReport:
    """The bits of one linear.

    Attributes:
        weights: number of weights, rows * cols.
        field_bytes: bytes of each stored field; the bias is not among them.
        salient_share: share r of salient columns.
        paper_bits: bits per weight as the papers count them.
        floor: bits per weight that each part needs at least: `mask`, `sign`, `label`,
            `second_sign`, `scales`, `bitmap`.
    """

    weights: int
    field_bytes: dict[str, int]
    salient_share: float
    paper_bits: float
    floor: dict[str, float]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(self.field_bytes.values())

    @property
    def stored_bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights

    @property
    def floor_bits(self) -> float:
        """Sum of `floor`, bits per weight."""
        return sum(self.floor.values())


@dataclass(frozen=True)
class ModelBits:
    """The bits of many linears and of the file around them.

    Attributes:
        weights: weights in the linears.
        linear_bytes: stored bytes of the linears.
        stored_bits, paper_bits, floor_bits: per weight of the linears, averaged over weights.
        other_bytes, other_params: everything else: embeddings, norms, biases, head.
        file_bits: bits per parameter of the whole, linears and others together.
    """

    weights: int
    linear_bytes: int
    stored_bits: float
    paper_bits: float
    floor_bits: float
    other_bytes: int
    other_params: int
    file_bits: float


def bit_report(layout: Layout, salient_columns: int = 0) -> BitReport:
    """Count the bits of one linear of which `salient_columns` columns are salient.

    Raises:
        ValueError: more salient columns than columns, or any without a salient level table.
    """
    most = layout.cols if layout.salient is not None else 0
    if not 0 <= salient_columns <= most:
        raise ValueError(f"salient_columns must be from 0 to {most}, not {salient_columns}.")
    share = salient_columns / layout.cols
    return BitReport(
        weights=layout.rows * layout.cols,
        field_bytes={name: field.nbytes for name, field in layout.fields().items()},
        salient_share=share,
        paper_bits=_paper_bits(layout, share),
        floor=_floor(layout, salient_columns),
    )


def model_bits(
    reports: Iterable[BitReport], other_bytes: int = 0, other_params: int = 0
) -> ModelBits:
    """Sum over the linears of a model, and over its file if the other bytes are given.

    Raises:
        ValueError: no linears.
    """
    reports = list(reports)
    weights = sum(report.weights for report in reports)
    if not weights:
        raise ValueError("there are no linears to sum over.")
    nbytes = sum(report.nbytes for report in reports)
    return ModelBits(
        weights=weights,
        linear_bytes=nbytes,
        stored_bits=8 * nbytes / weights,
        paper_bits=sum(report.paper_bits * report.weights for report in reports) / weights,
        floor_bits=sum(report.floor_bits * report.weights for report in reports) / weights,
        other_bytes=other_bytes,
        other_params=other_params,
        file_bits=8 * (nbytes + other_bytes) / (weights + other_params),
    )


def _shares(layout: Layout, share: float) -> list[tuple[str, int, float]]:
    """`(kind, groups, share of columns)` of each level table."""
    return [
        (kind, groups, weight)
        for (kind, groups), weight in zip(layout.tables(), (1 - share, share), strict=False)
    ]


def _paper_bits(layout: Layout, share: float) -> float:
    """Sign planes are counted, group labels are not; "free" levels count as log2 of their number.

    So 2-bit round-to-nearest is 2, as its papers say, and a level that is zero counts as one.
    """
    density = 1.0 if layout.nm is None else layout.nm[0] / layout.nm[1]
    bits = 0.0
    for kind, groups, weight in _shares(layout, share):
        signs = len(LEVEL_KINDS[kind].radices)
        bits += weight * (signs or log2(groups + layout.zeros))
    return bits * density


def _floor(layout: Layout, salient_columns: int) -> dict[str, float]:
    """See `BitReport.floor`; with zeros but no N:M, `label` holds the whole code."""
    rows, cols = layout.rows, layout.cols
    floor = dict.fromkeys(("mask", "sign", "label", "second_sign", "scales", "bitmap"), 0.0)
    density = 1.0
    if layout.nm is not None:
        n, m = layout.nm
        full, rest = divmod(cols, m)
        density = (full * n + min(n, rest)) / cols
        floor["mask"] = (full * log2(comb(m, n)) + log2(comb(rest, min(n, rest)))) / cols
    for (kind, groups, weight), count in zip(
        _shares(layout, salient_columns / cols), layout.level_counts(), strict=True
    ):
        if layout.zeros:
            floor["label"] += weight * log2(count + 1)
            continue
        planes = len(LEVEL_KINDS[kind].radices)
        floor["sign"] += weight * density * min(planes, 1)
        floor["second_sign"] += weight * density * max(planes - 1, 0)
        floor["label"] += weight * density * log2(groups)
    stored = layout.fields()
    records = ("levels", "salient_levels", "scale")
    floor["scales"] = 8 * sum(stored[r].nbytes for r in records if r in stored) / (rows * cols)
    if layout.salient is not None:
        choices = lgamma(cols + 1) - lgamma(salient_columns + 1)
        choices -= lgamma(cols - salient_columns + 1)
        floor["bitmap"] = choices / log(2) / (rows * cols)
    return floor
