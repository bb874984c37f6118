"""From coded blocks to one compressed linear."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable, on_int8_grid
from subbit.linalg import BlockView, Factor, run_blocks
from subbit.methods.base import Settings

__all__ = ["CodedBlock", "assemble", "compress_blocks"]


@dataclass(frozen=True)
class CodedBlock:
    """One column block as codes and levels, as it will be stored.

    Attributes:
        codes: uint8 `(rows, b)`.
        levels: its ordinary levels, parameters `(rows, 1, P)`.
        salient: bool `(b,)` or None.
        salient_levels: parameters `(rows, 1, Ps)`, or None.
    """

    codes: Tensor
    levels: LevelTable
    salient: Tensor | None = None
    salient_levels: LevelTable | None = None

    def dense(self) -> Tensor:
        """The weights that will be read back from the file, float32 `(rows, b)`."""
        return assemble([self], self.codes.shape[1], None, {}).dequantize()


def compress_blocks(
    W: Tensor,
    factor: Factor,
    settings: Settings,
    nm: tuple[int, int] | None,
    compress_block: Callable[[BlockView], CodedBlock],
    *,
    record: dict[str, Any],
    compensation: str = "diagonal",
    objective: str = "gram",
) -> CompressedLinear:
    """Run the block loop (`linalg.run_blocks`) with levels as they will be stored, and assemble.

    Levels go onto the int8 grid, if that is wanted, before the rest of the row absorbs the block's
    error, rounding included.
    """

    def stored(view: BlockView) -> CodedBlock:
        block = compress_block(view)
        if settings.levels == "fp16":
            return block
        levels, salient_levels = on_int8_grid(block.levels, block.salient_levels)
        return replace(block, levels=levels, salient_levels=salient_levels)

    blocks = run_blocks(
        W, factor, settings.blocksize, stored, compensation=compensation, objective=objective
    )
    return assemble(blocks, settings.blocksize, nm, record)


def assemble(
    blocks: list[CodedBlock], blocksize: int, nm: tuple[int, int] | None, record: dict[str, Any]
) -> CompressedLinear:
    """Join blocks, left to right; salient levels are dropped where no column is salient."""
    salient = _join([block.salient for block in blocks])
    if salient is not None and not bool(salient.any()):
        salient = None
    return CompressedLinear(
        codes=torch.cat([block.codes for block in blocks], 1),
        levels=_tables([block.levels for block in blocks]),
        group_size=blocksize,
        nm=nm,
        salient=salient,
        salient_levels=_tables([b.salient_levels for b in blocks]) if salient is not None else None,
        record=record,
    )


def _join(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([p for p in parts if p is not None])


def _tables(tables: list[LevelTable | None]) -> LevelTable | None:
    if tables[0] is None:
        return None
    kind, groups = tables[0].kind, tables[0].groups
    present = [table for table in tables if table is not None]
    scales = [table.scale for table in present if table.scale is not None]
    params = torch.cat([table.params for table in present], 1)
    return LevelTable(kind, groups, params, torch.cat(scales, 1) if scales else None)
