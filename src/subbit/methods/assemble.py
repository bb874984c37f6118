"""From coded blocks to one compressed linear."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subbit.binarize.groups import Groups
from subbit.binarize.spbo import Part
from subbit.codes import CompressedLinear, LevelTable

__all__ = ["CodedBlock", "assemble", "code_block"]

_KINDS = {  # by planes and whether there is a mean
    (1, True): "pairs",
    (1, False): "symmetric",
    (2, True): "residual",
    (2, False): "symmetric_residual",
}


@dataclass(frozen=True)
class CodedBlock:
    """One column block as codes and levels.

    Attributes:
        codes: uint8 `(rows, b)`.
        levels: its ordinary levels, parameters `(rows, 1, P)`.
        salient: bool `(b,)` for columns, `(rows, b)` for single weights, or None.
        salient_levels: parameters `(rows, 1, Ps)`, or None.
        column_scale: float16 `(b,)`, or None.
    """

    codes: Tensor
    levels: LevelTable
    salient: Tensor | None = None
    salient_levels: LevelTable | None = None
    column_scale: Tensor | None = None

    def dense(self) -> Tensor:
        """The weights that the block means, float32 `(rows, b)`."""
        return assemble([self], self.codes.shape[1], None, {}, dtype=None).dequantize()


def assemble(
    blocks: list[CodedBlock],
    blocksize: int,
    nm: tuple[int, int] | None,
    record: dict[str, Any],
    *,
    structured: bool = False,
    dtype: torch.dtype | None = torch.float16,
) -> CompressedLinear:
    """Join blocks, left to right; salient levels are dropped where nothing is salient.

    The parameters are rounded to `dtype`, None = not at all; only float16 can be packed.
    """
    salient = _join([block.salient for block in blocks])
    some = salient is not None and bool(salient.any())
    return CompressedLinear(
        codes=torch.cat([block.codes for block in blocks], 1),
        levels=_tables([block.levels for block in blocks], dtype),
        group_size=blocksize,
        nm=nm,
        salient=salient if some else None,
        salient_levels=_tables([b.salient_levels for b in blocks], dtype) if some else None,
        structured=structured,
        column_scale=_join([block.column_scale for block in blocks]),
        record=record,
    )


def _join(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([p for p in parts if p is not None], -1)


def _tables(tables: list[LevelTable | None], dtype: torch.dtype | None) -> LevelTable | None:
    if tables[0] is None:
        return None
    kind, groups = tables[0].kind, tables[0].groups
    params = torch.cat([t.params for t in tables if t is not None], 1)
    return LevelTable(kind, groups, params if dtype is None else params.to(dtype))


def code_block(
    groups: Groups,
    keep: Tensor,
    ordinary: Part,
    salient: Part,
    *,
    mean: bool = True,
    dtype: torch.dtype = torch.float16,
) -> CodedBlock:
    """Turn the fitted parts of a block into codes and stored parameters.

    Args:
        groups: of the block.
        keep: bool `(rows, b)`: what pruning leaves.
        ordinary: the groups of the ordinary columns, stacked, one plane each.
        salient: the groups of the salient columns, stacked, two planes each.
        mean: whether the levels have a mean; without it, the parts' must be 0.
        dtype: of the parameters: float16 for the rest of the weight to make up for their rounding
            too, float32 for it to see them as they were fitted.
    """
    codes = torch.zeros_like(keep, dtype=torch.uint8)
    columns = ~groups.salient
    codes[:, columns] = _codes(ordinary, groups.labels[:, columns])
    codes[:, ~columns] = _codes(salient, groups.labels[:, ~columns])
    return CodedBlock(
        codes=codes * keep,
        levels=_levels(ordinary, mean, dtype),
        salient=groups.salient,
        salient_levels=_levels(salient, mean, dtype),
    )


def _codes(part: Part, labels: Tensor) -> Tensor:
    """1 + level index of every weight, uint8 `(rows, k)`; signs first, then the group label."""
    signs = (part.signs.sum(0) > 0).to(torch.uint8)  # a weight is in one group only
    codes, scale = 1 + signs[:, 0], 2
    for plane in range(1, signs.shape[1]):
        codes, scale = codes + scale * signs[:, plane], 2 * scale
    return codes + scale * labels


def _levels(part: Part, mean: bool, dtype: torch.dtype) -> LevelTable:
    """Stored parameters: first all alphas of the first plane, then of the second, then the mus."""
    planes = part.signs.shape[-2]
    params = part.params.permute(1, 2, 0)  # (rows, mu and alphas, groups)
    params = torch.cat((params[:, 1:], params[:, :1]), 1) if mean else params[:, 1:]
    params = params.flatten(1).to(dtype).unsqueeze(1)
    return LevelTable(_KINDS[planes, mean], part.params.shape[0], params)
