"""From coded blocks to one compressed linear."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from subbit.binarize.groups import Groups
from subbit.binarize.row_column import RowColumnPart
from subbit.binarize.spbo import Part
from subbit.codes import CompressedLinear, LevelTable, on_int8_grid, row_scale

__all__ = [
    "CodedBlock",
    "FittedPart",
    "assemble",
    "code_block",
    "code_part",
    "join_rows",
    "storing",
]

FittedPart = Part | RowColumnPart
"""The groups of some columns, stacked."""

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
        column_scale: `(b,)` or `(S, b)` as in `CompressedLinear`, or None.
    """

    codes: Tensor
    levels: LevelTable
    salient: Tensor | None = None
    salient_levels: LevelTable | None = None
    column_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights that the block means, float32 `(rows, b)`."""
        return assemble([self], self.codes.shape[1], None, {}, dtype=None).dequantize()


def storing(
    levels: Literal["fp16", "int8", "int8-row"], W: Tensor
) -> Callable[[CodedBlock], CodedBlock]:
    """What gives a block the levels that will be read back from the file.

    A method calls it before the rest of the row absorbs the block's error, so that rounding to the
    int8 grid is absorbed too. With "fp16" the block is returned as it is: its parameters have been
    rounded where they were coded. With "int8-row" 127 is the largest |w| of the row.

    Args:
        levels: as in `Settings`.
        W: the linear's weights, float32 `(rows, cols)`.
    """
    scale = row_scale(W) if levels == "int8-row" else None

    def as_stored(block: CodedBlock) -> CodedBlock:
        if levels == "fp16":
            return block
        own, salient = on_int8_grid(block.levels, block.salient_levels, scale)
        return replace(block, levels=own, salient_levels=salient)

    return as_stored


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

    The parameters are rounded to `dtype`, None = not at all; only float16 can be packed. Int8
    levels stay what they are.
    """
    salient = _join([block.salient for block in blocks])
    some = salient is not None and bool(salient.any())
    scale = _join([block.column_scale for block in blocks])
    return CompressedLinear(
        codes=torch.cat([block.codes for block in blocks], 1),
        levels=_tables([block.levels for block in blocks], dtype),
        group_size=blocksize,
        nm=nm,
        salient=salient if some else None,
        salient_levels=_tables([b.salient_levels for b in blocks], dtype) if some else None,
        structured=structured,
        column_scale=scale if scale is None or dtype is None else scale.to(dtype),
        record=record,
    )


def join_rows(parts: list[tuple[Tensor, CompressedLinear]]) -> CompressedLinear:
    """Put rows that were compressed apart, without salient columns, where they belong.

    Args:
        parts: for every part its rows, int64 `(k,)`, and what they became, all of one form.
    """
    order = torch.cat([rows for rows, _ in parts]).argsort()
    made = [part for _, part in parts]

    def rows_of(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    scales = [part.levels.scale for part in made if part.levels.scale is not None]
    width = max((scale.shape[1] for scale in scales), default=0)  # 1 where they are alike by chance
    levels = replace(
        made[0].levels,
        params=rows_of([part.levels.params for part in made]),
        scale=rows_of([scale.expand(-1, width) for scale in scales]) if scales else None,
    )
    return replace(made[0], codes=rows_of([part.codes for part in made]), levels=levels)


def _join(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([p for p in parts if p is not None], -1)


def _tables(tables: list[LevelTable | None], dtype: torch.dtype | None) -> LevelTable | None:
    if tables[0] is None:
        return None
    kind, groups = tables[0].kind, tables[0].groups
    present = [table for table in tables if table is not None]
    params = torch.cat([table.params for table in present], 1)
    scales = [table.scale for table in present if table.scale is not None]
    if scales:
        # of "int8-row", or alike by chance: kept once, nothing is lost
        shared = all(scale.equal(scales[0]) for scale in scales)
        return LevelTable(kind, groups, params, scales[0] if shared else torch.cat(scales, 1))
    return LevelTable(kind, groups, params if dtype is None else params.to(dtype))


def code_block(
    groups: Groups,
    keep: Tensor,
    ordinary: FittedPart,
    salient: FittedPart,
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
        mean: whether the levels have a mean; without it, the parts' must be 0 or lacking.
        dtype: of the parameters: float16 for the rest of the weight to make up for their rounding
            too, float32 for it to see them as they were fitted.
    """
    codes = torch.zeros_like(keep, dtype=torch.uint8)
    columns = ~groups.salient
    codes[:, columns], levels = code_part(ordinary, groups.labels[:, columns], mean, dtype)
    codes[:, ~columns], extra = code_part(salient, groups.labels[:, ~columns], mean, dtype)
    return CodedBlock(
        codes=codes * keep,
        levels=levels,
        salient=groups.salient,
        salient_levels=extra,
        column_scale=_column_scale(groups, ordinary, salient, dtype),
    )


def code_part(
    part: FittedPart, labels: Tensor, mean: bool, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, LevelTable]:
    """Codes uint8 `(rows, k)` and levels of one part; `labels`: the group of every weight."""
    return _codes(part, labels), _levels(part, mean, dtype)


def _codes(part: FittedPart, labels: Tensor) -> Tensor:
    """1 + level index of every weight, uint8 `(rows, k)`; signs first, then the group label."""
    signs = (part.signs.sum(0) > 0).to(torch.uint8)  # a weight is in one group only
    codes, scale = 1 + signs[:, 0], 2
    for plane in range(1, signs.shape[1]):
        codes, scale = codes + scale * signs[:, plane], 2 * scale
    return codes + scale * labels


def _levels(part: FittedPart, mean: bool, dtype: torch.dtype) -> LevelTable:
    """Stored parameters: first all alphas of the first plane, then of the second, then the mus."""
    groups, _, planes, _ = part.signs.shape
    if isinstance(part, RowColumnPart):
        params = part.row_scales
    elif mean:
        params = torch.cat((part.params[..., 1:], part.params[..., :1]), -1)
    else:
        params = part.params[..., 1:]
    params = params.permute(1, 2, 0).flatten(1).to(dtype).unsqueeze(1)
    return LevelTable(_KINDS[planes, mean], groups, params)


def _column_scale(
    groups: Groups, ordinary: FittedPart, salient: FittedPart, dtype: torch.dtype
) -> Tensor | None:
    """Factors of the parameters in the order of `_levels`, `(S, b)`; 1 where there are fewer."""
    if not isinstance(ordinary, RowColumnPart) or not isinstance(salient, RowColumnPart):
        return None
    parts = [part.column_scales.transpose(0, 1).flatten(0, 1) for part in (ordinary, salient)]
    scale = parts[0].new_ones(max(map(len, parts)), len(groups.salient))
    scale[: len(parts[0]), ~groups.salient] = parts[0]
    scale[: len(parts[1]), groups.salient] = parts[1]
    return scale.to(dtype)
