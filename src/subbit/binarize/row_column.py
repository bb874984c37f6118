"""Row and column scales (ARB-RC): a weight is a sum of `row_scale * column_scale * sign`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subbit.binarize.arb import nearest_signs

__all__ = ["RowColumnPart", "fit_row_column"]


@dataclass(frozen=True)
class RowColumnPart:
    """One binarised part of a block with scales of rows and of columns, or several stacked.

    Attributes:
        support: bool `(..., rows, b)`.
        signs: float32 `(..., rows, planes, b)` of +-1, 0 off the support.
        row_scales: float32 `(..., rows, planes)`.
        column_scales: float32 `(..., planes, b)`.
    """

    support: Tensor
    signs: Tensor
    row_scales: Tensor
    column_scales: Tensor

    def dense(self) -> Tensor:
        """What the planes add up to, float32 `(..., rows, b)`, 0 off the support."""
        scales = self.row_scales.unsqueeze(-1) * self.column_scales.unsqueeze(-3)
        return (scales * self.signs).sum(-2)


def fit_row_column(W: Tensor, support: Tensor, planes: int, iterations: int) -> RowColumnPart:
    """Binarise with row and column scales, refined in turn; there is no mean (ARB-LLM, ARB-RC).

    Each plane starts as mean |w| over a row, then mean |w| / row scale over a column, and the
    signs of what the planes before it leave. An iteration fits, plane by plane, the row scales
    and then the column scales by least squares, and takes the nearest levels.

    Args:
        W: float32 `(rows, b)`; support: bool `(..., rows, b)`.
        planes: 1, or 2.
        iterations: 15 in the paper.
    """
    kept = support.to(W.dtype)
    target = W * kept
    rows, columns, signs = _start(target, kept, planes)
    for _ in range(iterations):
        parts = [_plane(r, c, s) for r, c, s in zip(rows, columns, signs)]
        for i, sign in enumerate(signs):
            left = (target - sum(parts[:i] + parts[i + 1 :])) * sign
            rows[i] = _ratio(_times(left, columns[i]), _times(kept, columns[i].square()))
            columns[i] = _ratio(_times(left.mT, rows[i]), _times(kept.mT, rows[i].square()))
            parts[i] = _plane(rows[i], columns[i], sign)
        scales = [r.unsqueeze(-1) * c.unsqueeze(-2) for r, c in zip(rows, columns)]
        signs = [sign * kept for sign in nearest_signs(target, scales)]
    return RowColumnPart(
        support, torch.stack(signs, -2), torch.stack(rows, -1), torch.stack(columns, -2)
    )


def _start(
    target: Tensor, kept: Tensor, planes: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Row scales `(..., rows)`, column scales `(..., b)` and signs `(..., rows, b)` per plane."""
    rows, columns, signs = [], [], []
    left = target
    for _ in range(planes):
        row = _ratio(left.abs().sum(-1), kept.sum(-1))
        relative = _ratio(left.abs(), row.unsqueeze(-1).expand_as(left))
        column = _ratio(relative.sum(-2), kept.sum(-2))
        sign = torch.where(left >= 0, 1.0, -1.0) * kept
        left = left - _plane(row, column, sign)
        rows.append(row)
        columns.append(column)
        signs.append(sign)
    return rows, columns, signs


def _plane(row: Tensor, column: Tensor, sign: Tensor) -> Tensor:
    return row.unsqueeze(-1) * column.unsqueeze(-2) * sign


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
