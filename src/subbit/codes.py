"""The neutral result of every method: a compressed linear is codes and levels.

Every row of every column group has a handful of levels; every weight is a code that names its
level, or 0 for a weight that is exactly zero. Methods make this, `packed/` stores it, kernels read
it, the bit report counts it. Nothing downstream knows which method made it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEVEL_KINDS", "CompressedLinear", "LevelKind", "LevelTable", "on_int8_grid"]


def _pairs(params: Tensor, groups: int) -> Tensor:
    alpha, mu = params[..., :groups], params[..., groups:]
    return torch.stack((mu - alpha, mu + alpha), -1).flatten(-2)


def _symmetric(params: Tensor, groups: int) -> Tensor:
    return torch.stack((-params, params), -1).flatten(-2)


def _residual(params: Tensor, groups: int) -> Tensor:
    alpha1, alpha2, mu = (params[..., i * groups : (i + 1) * groups] for i in range(3))
    low, high = mu - alpha1, mu + alpha1
    return torch.stack((low - alpha2, high - alpha2, low + alpha2, high + alpha2), -1).flatten(-2)


def _free(params: Tensor, groups: int) -> Tensor:
    return params


@dataclass(frozen=True)
class LevelKind:
    """How the stored parameters of one row and column group become its level values.

    Attributes:
        params_per_group: stored parameters for each of the `groups` groups.
        levels_per_group: level values that one group yields.
        radices: sizes of the digits of a level index, least significant first, before the group
            digit; e.g. `(2,)` = a sign bit, then the group label.
        expand: float32 parameters `(..., P)` -> level values `(..., L)`, in index order
            `digit0 + radix0 * (digit1 + ...)`, the group label the most significant digit.
    """

    params_per_group: int
    levels_per_group: int
    radices: tuple[int, ...]
    expand: Callable[[Tensor, int], Tensor]


LEVEL_KINDS: dict[str, LevelKind] = {
    # mu_g -+ alpha_g; parameters (alpha_1..alpha_G, mu_1..mu_G); index = sign + 2 * group
    "pairs": LevelKind(2, 2, (2,), _pairs),
    # -+ alpha_g; parameters (alpha_1..alpha_G); index = sign + 2 * group
    "symmetric": LevelKind(1, 2, (2,), _symmetric),
    # mu_g -+ alpha1_g -+ alpha2_g; parameters (alpha1_1.., alpha2_1.., mu_1..);
    # index = sign1 + 2 * sign2 + 4 * group
    "residual": LevelKind(3, 4, (2, 2), _residual),
    # any values; `groups` = number of levels; index = level
    "free": LevelKind(1, 1, (), _free),
}


@dataclass(frozen=True)
class LevelTable:
    """The levels of every row and column group of one linear.

    Attributes:
        kind: a key of `LEVEL_KINDS`.
        groups: number of level groups G (for "free": the number of levels).
        params: what is stored: float16 `(rows, ngroups_of_columns, P)`, `P = G * params_per_group`;
            with a scale the levels themselves, int8 `(rows, ngroups_of_columns, L)`.
        scale: bfloat16 `(rows, ngroups_of_columns)` by which int8 levels are multiplied, or None.
    """

    kind: str
    groups: int
    params: Tensor
    scale: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of levels L a row has in one column group."""
        return self.groups * LEVEL_KINDS[self.kind].levels_per_group

    def values(self) -> Tensor:
        """Level values, float32 `(rows, ngroups_of_columns, L)`, computed in float32."""
        if self.scale is not None:  # the product of 8 by 8 significant bits is exact
            return self.params.float() * self.scale.float().unsqueeze(-1)
        return LEVEL_KINDS[self.kind].expand(self.params.float(), self.groups)


@dataclass(frozen=True)
class CompressedLinear:
    """One linear as codes and levels.

    Attributes:
        codes: uint8 `(rows, cols)`; 0 = exactly zero, c > 0 = level c - 1 of that row and column
            group, from `salient_levels` in salient columns, else from `levels`.
        levels: levels of the ordinary columns.
        group_size: columns that share one level record (the last group may be shorter).
        nm: `(N, M)`, N kept of every M consecutive columns (exactly; the last cols % M columns
            form a group padded with zeros and keep min(N, cols % M)); None = no such structure.
        salient: bool `(cols,)` or None; columns whose levels come from `salient_levels`.
        salient_levels: levels of the salient columns, or None; int8 levels share the scale of
            `levels`.
        record: JSON-able facts about the fit (loss, salient share, damping, ...).
    """

    codes: Tensor
    levels: LevelTable
    group_size: int
    nm: tuple[int, int] | None = None
    salient: Tensor | None = None
    salient_levels: LevelTable | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, cols)` of the dense weight."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the dense weight these codes mean, float32 `(rows, cols)`."""
        rows, cols = self.shape
        table = self.levels.values()
        zero = table.new_zeros(*table.shape[:2], 1)
        table = torch.cat((zero, table), -1)
        index = self.codes.long()
        if self.salient is not None and self.salient_levels is not None:
            offset = table.shape[-1]
            table = torch.cat((table, zero, self.salient_levels.values()), -1)
            index = index + offset * self.salient.long()
        ngroups = table.shape[1]
        padding = ngroups * self.group_size - cols
        index = torch.nn.functional.pad(index, (0, padding)).view(rows, ngroups, self.group_size)
        return table.gather(-1, index).view(rows, -1)[:, :cols]


def on_int8_grid(
    levels: LevelTable, salient_levels: LevelTable | None
) -> tuple[LevelTable, LevelTable | None]:
    """Round levels to int8 multiples of one scale for each row and column group.

    The scale is the largest absolute level of both tables / 127, rounded to bfloat16; 0 where all
    levels are 0. Tables that are on such a grid already are returned as they are.

    Args:
        levels: of the ordinary columns.
        salient_levels: of the salient columns, or None.
    """
    if levels.scale is not None:
        return levels, salient_levels
    tables = [levels] if salient_levels is None else [levels, salient_levels]
    values = [table.values() for table in tables]
    largest = torch.stack([value.abs().amax(-1) for value in values]).amax(0)
    scale = (largest / 127).bfloat16()
    step = scale.float().unsqueeze(-1)
    step = step.masked_fill(step == 0, torch.inf)
    snapped = [
        LevelTable(
            table.kind, table.groups, (value / step).round().clamp(-127, 127).to(torch.int8), scale
        )
        for table, value in zip(tables, values)
    ]
    return snapped[0], snapped[1] if len(snapped) > 1 else None
