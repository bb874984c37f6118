"""How many bits a weight takes: the papers' count, the bytes that are stored, and the floor.

Paper bits count signs alone (N_param of equation 10 of PBS²P): `(2 r + (1 - r)) N / M` with r the
share of salient columns; the k bits of a grid; 16 bits for every weight that pruning alone has
left. Stored bits are 8 x bytes of all fields / weights. The floor is what the same information
takes at least, were every mask, sign and label equally likely.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2, prod

from subbit.codes import LEVEL_KINDS
from subbit.packed.layout import Layout, Table
from subbit.packed.pack import AnyLayout
from subbit.packed.sparse import SparseLayout
from subbit.packed.support import log2_choices

__all__ = ["BitReport", "ModelBits", "bit_report", "model_bits"]


@dataclass(frozen=True)
class BitReport:
    """The bits of one linear.

    Attributes:
        weights: number of weights, rows * cols.
        field_bytes: bytes of each stored field; the bias is not among them.
        salient_share: share r of salient columns or weights.
        paper_bits: bits per weight as the papers count them.
        floor: bits per weight that each part needs at least: `mask`, `sign`, `label`,
            `second_sign`, `scales`, `bitmap` (which are salient), `values` (of 16 or 8 bits).
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


def bit_report(
    layout: AnyLayout, salient_columns: int = 0, kept_share: float | None = None
) -> BitReport:
    """Count the bits of one linear of which `salient_columns` columns are salient.

    Args:
        layout: of the linear.
        salient_columns: how many columns are salient.
        kept_share: share of weights that are not pruned; matters only where single weights are
            (`zeros`), which the layout does not count. None = all are counted.

    Raises:
        ValueError: more salient columns than columns, or any where no columns can be salient.
    """
    weights = layout.rows * layout.cols
    sparse = isinstance(layout, SparseLayout)
    most = 0 if sparse or layout.salient is None else layout.cols
    if not sparse and layout.salient_elements is not None:
        most, share = 0, layout.salient_elements / weights
    else:
        share = salient_columns / layout.cols
    if not 0 <= salient_columns <= most:
        raise ValueError(f"salient_columns must be from 0 to {most}, not {salient_columns}.")
    return BitReport(
        weights=weights,
        field_bytes={name: field.nbytes for name, field in layout.fields().items()},
        salient_share=share,
        paper_bits=16 * _density(layout) if sparse else _paper_bits(layout, share, kept_share),
        floor=_sparse_floor(layout) if sparse else _floor(layout, share),
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


def _density(layout: SparseLayout) -> float:
    """Share of kept weights as the papers count it."""
    if layout.elements is not None:
        return layout.elements / (layout.rows * layout.cols)
    return layout.support.share


def _shares(layout: Layout, share: float) -> list[tuple[Table, float]]:
    """Each level table and the share of kept weights that it serves."""
    if layout.kept_columns is not None:  # salient columns are among those that are kept
        share = min(1.0, share * layout.cols / layout.kept_columns)
    return list(zip(layout.tables(), (1 - share, share), strict=False))


def _paper_bits(layout: Layout, share: float, kept_share: float | None) -> float:
    """Signs (and trits) are counted, group labels are not; "free" levels as log2 of their number.

    So 2-bit round-to-nearest is 2, as its papers say, and a level that is zero counts as one.
    """
    bits = 0.0
    counted = layout.zeros and kept_share is not None
    density = kept_share if counted else layout.support.share
    for table, weight in _shares(layout, share):
        signs = log2(prod(LEVEL_KINDS[table.kind].radices))
        whole = table.integer_bits if table.kind == "grid" and not layout.zeros else 0
        levels = whole or log2(table.groups + layout.zeros)
        bits += weight * (signs * density if signs else levels * layout.support.share)
    return bits


def _floor(layout: Layout, share: float) -> dict[str, float]:
    """See `BitReport.floor`; with zeros but no N:M, `label` holds the whole code."""
    rows, cols = layout.rows, layout.cols
    names = ("mask", "sign", "label", "second_sign", "scales", "bitmap", "values")
    floor = dict.fromkeys(names, 0.0)
    floor["mask"] = layout.support.floor(rows)
    density = layout.support.real / cols
    tables = _shares(layout, share)
    if layout.salient_elements is not None:
        special, weight = tables.pop()
        floor["values"] = weight * log2(special.count)
        floor["bitmap"] = log2_choices(rows * cols, layout.salient_elements) / (rows * cols)
    elif layout.salient is not None:
        floor["bitmap"] = log2_choices(cols, round(share * cols)) / (rows * cols)
    for table, weight in tables:
        if layout.zeros:
            floor["label"] += weight * log2(table.count + 1)
            continue
        first, *others = LEVEL_KINDS[table.kind].radices or (1,)
        floor["sign"] += weight * density * log2(first)
        floor["second_sign"] += weight * density * log2(prod(others))
        floor["label"] += weight * density * log2(table.groups)
    floor["scales"] = sum(table.record_bits * table.records for table in layout.tables()) / cols
    floor["scales"] += 16 * layout.scales / layout.cols
    if layout.column_scale:
        floor["scales"] += 16 * max(layout.scaled_params, 1) / rows
    return floor


def _sparse_floor(layout: SparseLayout) -> dict[str, float]:
    """See `BitReport.floor`."""
    weights = layout.rows * layout.cols
    if layout.elements is not None:
        mask = log2_choices(weights, layout.elements) / weights
        return {"mask": mask, "values": 16 * layout.elements / weights}
    support = layout.support
    return {"mask": support.floor(layout.rows), "values": 16 * support.real / layout.cols}
