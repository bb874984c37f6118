"""From coded blocks to one compressed linear."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subbit.codes import CompressedLinear, LevelTable

__all__ = ["CodedBlock", "assemble"]


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
    return LevelTable(kind, groups, torch.cat([t.params for t in tables if t is not None], 1))
