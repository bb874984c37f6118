"""The neutral result of every method: codes and levels, or 16-bit values under a mask.

`CompressedLinear`: every row of every column group has a handful of levels; every weight is a code
that names its level, or 0 for a weight that is exactly zero. `SparseLinear`, of methods that only
prune: the kept weights themselves, in 16 bits. Methods make these, `packed/` stores them, kernels
read them, the bit report counts them. Nothing downstream knows which method made it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LEVEL_KINDS",
    "Compressed",
    "CompressedLinear",
    "LevelKind",
    "LevelTable",
    "SparseLinear",
    "on_int8_grid",
    "row_scale",
]

_AT_ONCE = 1 << 20  # weights that are looked up at a time: their 64-bit indices stay small


def _pairs(params: Tensor, groups: int) -> Tensor:
    alpha, mu = params[..., :groups], params[..., groups:]
    return torch.stack((mu - alpha, mu + alpha), -1).flatten(-2)


def _symmetric(params: Tensor, groups: int) -> Tensor:
    return torch.stack((-params, params), -1).flatten(-2)


def _residual(params: Tensor, groups: int) -> Tensor:
    alpha1, alpha2, mu = (params[..., i * groups : (i + 1) * groups] for i in range(3))
    low, high = mu - alpha1, mu + alpha1
    return torch.stack((low - alpha2, high - alpha2, low + alpha2, high + alpha2), -1).flatten(-2)


def _symmetric_residual(params: Tensor, groups: int) -> Tensor:
    return _residual(torch.nn.functional.pad(params, (0, groups)), groups)


def _ternary(params: Tensor, groups: int) -> Tensor:
    return torch.stack((-params, torch.zeros_like(params), params), -1).flatten(-2)


def _free(params: Tensor, groups: int) -> Tensor:
    return params


def _grid(params: Tensor, groups: int) -> Tensor:
    steps = torch.arange(groups, dtype=params.dtype, device=params.device)
    return (steps - params[..., 1:]) * params[..., :1]


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
        shared: stored parameters that all groups have in common.
        integers: how many parameters, the last ones, are whole numbers from 0 to L - 1; they are
            stored in as few bits as that takes.
    """

    params_per_group: int
    levels_per_group: int
    radices: tuple[int, ...]
    expand: Callable[[Tensor, int], Tensor]
    shared: int = 0
    integers: int = 0

    def params(self, groups: int) -> int:
        """Number of parameters P of `groups` groups."""
        return self.shared + groups * self.params_per_group


LEVEL_KINDS: dict[str, LevelKind] = {
    # mu_g -+ alpha_g; parameters (alpha_1..alpha_G, mu_1..mu_G); index = sign + 2 * group
    "pairs": LevelKind(2, 2, (2,), _pairs),
    # -+ alpha_g; parameters (alpha_1..alpha_G); index = sign + 2 * group
    "symmetric": LevelKind(1, 2, (2,), _symmetric),
    # mu_g -+ alpha1_g -+ alpha2_g; parameters (alpha1_1.., alpha2_1.., mu_1..);
    # index = sign1 + 2 * sign2 + 4 * group
    "residual": LevelKind(3, 4, (2, 2), _residual),
    # -+ alpha1_g -+ alpha2_g; parameters (alpha1_1.., alpha2_1..); index as in "residual"
    "symmetric_residual": LevelKind(2, 4, (2, 2), _symmetric_residual),
    # -alpha_g, 0, alpha_g; parameters (alpha_1..alpha_G); index = trit + 3 * group
    "ternary": LevelKind(1, 3, (3,), _ternary),
    # any values; `groups` = number of levels; index = level
    "free": LevelKind(1, 1, (), _free),
    # (i - zero) * scale for i = 0..groups-1; parameters (scale, zero), zero one of the i;
    # `groups` = number of levels, 2^k of a k-bit grid; index = i
    "grid": LevelKind(0, 1, (), _grid, shared=2, integers=1),
}


@dataclass(frozen=True)
class LevelTable:
    """The levels of every row and column group of one linear.

    Attributes:
        kind: a key of `LEVEL_KINDS`.
        groups: number of level groups G (for "free" and "grid": the number of levels).
        params: what is stored: float16 `(rows, ngroups_of_columns, P)`, P of `LevelKind.params`;
            with a scale the levels themselves, int8 `(rows, ngroups_of_columns, L)`, -127 to 127.
        scale: bfloat16 by which int8 levels are multiplied, or None: `(rows, ngroups_of_columns)`,
            or `(rows, 1)`, one for the whole row.
    """

    kind: str
    groups: int
    params: Tensor
    scale: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of levels L a row has in one column group."""
        return self.groups * LEVEL_KINDS[self.kind].levels_per_group

    def rows(self, rows: slice) -> "LevelTable":
        """The levels of some rows; they share memory with these."""
        scale = None if self.scale is None else self.scale[rows]
        return replace(self, params=self.params[rows], scale=scale)

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
            group, from `salient_levels` where salient, else from `levels`.
        levels: levels of the ordinary weights.
        group_size: columns that share one level record (the last group may be shorter).
        nm: `(N, M)`, N kept of every M consecutive columns (exactly; the last cols % M columns
            form a group padded with zeros and keep min(N, cols % M)); None = no such structure.
        salient: weights whose levels come from `salient_levels`, or None: bool `(cols,)` for whole
            columns, `(rows, cols)` for single weights (never pruned ones).
        salient_levels: levels of the salient weights, or None; int8 levels share the scale of
            `levels`.
        salient_group_size: columns that share one record of these, None = `group_size`; another
            number only where single weights are salient, and not with int8 levels.
        structured: True where whole columns are pruned and nothing else: every column has only
            codes 0 or none.
        column_scale: float16 or None: `(cols,)` multiplies every level of its column; `(S, cols)`
            multiplies in a column parameter k < S of its level record by row k, and goes with
            whole salient columns or none, and not with int8 levels.
        record: JSON-able facts about the fit (loss, salient share, damping, ...).
    """

    codes: Tensor
    levels: LevelTable
    group_size: int
    nm: tuple[int, int] | None = None
    salient: Tensor | None = None
    salient_levels: LevelTable | None = None
    salient_group_size: int | None = None
    structured: bool = False
    column_scale: Tensor | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, cols)` of the dense weight."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def kept(self) -> Tensor:
        """Which weights are not pruned, bool `(rows, cols)`."""
        return self.codes != 0

    @property
    def salient_share(self) -> float:
        """Share of salient columns or weights."""
        return 0.0 if self.salient is None else float(self.salient.float().mean())

    def dequantize(self) -> Tensor:
        """Return the dense weight these codes mean, float32 `(rows, cols)`.

        It is made some rows at a time: beside it no more than a few megabytes are held.
        """
        rows, cols = self.shape
        step = max(1, _AT_ONCE // max(cols, 1))
        if rows <= step:
            return self._dequantize()
        dense = torch.empty(rows, cols, dtype=torch.float32, device=self.codes.device)
        for start in range(0, rows, step):
            dense[start : start + step] = self._some_rows(slice(start, start + step))._dequantize()
        return dense

    def _some_rows(self, rows: slice) -> "CompressedLinear":
        """Some rows by themselves; they share memory with the whole."""
        columns = self.salient is None or self.salient.dim() == 1
        return replace(
            self,
            codes=self.codes[rows],
            levels=self.levels.rows(rows),
            salient=self.salient if columns else self.salient[rows],
            salient_levels=None if self.salient_levels is None else self.salient_levels.rows(rows),
        )

    def _dequantize(self) -> Tensor:
        """All rows at once."""
        if self.column_scale is not None and self.column_scale.dim() == 2:
            return self._dequantize_scaled(self.column_scale.float())
        table, index = _with_zero(self.levels), self.codes.long()
        if self.salient is None or self.salient_levels is None:
            dense = _look_up(table, index, self.group_size)
        elif self.salient.dim() == 1:  # one look-up in both tables side by side
            both = torch.cat((table, _with_zero(self.salient_levels)), -1)
            dense = _look_up(both, index + table.shape[-1] * self.salient, self.group_size)
        else:
            dense = _look_up(table, index.masked_fill(self.salient, 0), self.group_size)
            row, col = self.salient.nonzero(as_tuple=True)
            group = col // (self.salient_group_size or self.group_size)
            special = _with_zero(self.salient_levels)
            dense[row, col] = special[row, group, index[row, col]]
        return dense if self.column_scale is None else dense * self.column_scale.float()

    def _dequantize_scaled(self, scale: Tensor) -> Tensor:
        """Where every column has its own levels: one column group at a time."""
        dense = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        for group, start in enumerate(range(0, self.shape[1], self.group_size)):
            columns = slice(start, start + self.group_size)
            codes, factors = self.codes[:, columns].long().unsqueeze(-1), scale[:, columns]
            value = _scaled(self.levels, group, factors)
            part = value.gather(-1, codes.clamp_max(self.levels.count)).squeeze(-1)
            if self.salient is not None and self.salient_levels is not None:
                special = self.salient[columns]
                value = _scaled(self.salient_levels, group, factors[:, special])
                part[:, special] = value.gather(-1, codes[:, special]).squeeze(-1)
            dense[:, columns] = part
        return dense


@dataclass(frozen=True)
class SparseLinear:
    """One linear of which some weights are zero and the others have 16 bits.

    Attributes:
        values: float16 or bfloat16 `(rows, cols)`, 0 where pruned.
        mask: bool `(rows, cols)`, True = kept (a kept weight may be 0).
        nm: `(N, M)` as in `CompressedLinear`, or None.
        structured: True where whole columns are pruned and nothing else.
        record: JSON-able facts about the fit.
    """

    values: Tensor
    mask: Tensor
    nm: tuple[int, int] | None = None
    structured: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, cols)` of the dense weight."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def kept(self) -> Tensor:
        """Which weights are not pruned, bool `(rows, cols)`."""
        return self.mask

    @property
    def salient_share(self) -> float:
        """0: every kept weight is stored alike."""
        return 0.0

    def dequantize(self) -> Tensor:
        """Return the dense weight, float32 `(rows, cols)`."""
        return self.values.float()


Compressed = CompressedLinear | SparseLinear
"""What a method returns."""


def row_scale(values: Tensor) -> Tensor:
    """The scale on which int8 reaches the largest of a row: bfloat16 `(rows, 1)`.

    Args:
        values: float32 `(rows, ...)`.
    """
    return (values.abs().flatten(1).amax(1, keepdim=True) / 127).bfloat16()


def on_int8_grid(
    levels: LevelTable, salient_levels: LevelTable | None, scale: Tensor | None = None
) -> tuple[LevelTable, LevelTable | None]:
    """Round levels to int8 multiples of one scale for each row and column group, or each row.

    Tables that are on such a grid already are returned as they are.

    Args:
        levels: of the ordinary weights.
        salient_levels: of the salient weights, as many column groups, or None.
        scale: bfloat16 `(rows, 1)`, one scale for all groups of a row; levels beyond 127 of it are
            cut. None = for each row and group the largest absolute level of both tables / 127,
            rounded to bfloat16, 0 where all levels are 0.
    """
    if levels.scale is not None:
        return levels, salient_levels
    tables = [levels] if salient_levels is None else [levels, salient_levels]
    values = [table.values() for table in tables]
    if scale is None:
        largest = torch.stack([value.abs().amax(-1) for value in values]).amax(0)
        scale = (largest / 127).bfloat16()
    step = scale.float().unsqueeze(-1)
    step = step.masked_fill(step == 0, torch.inf)
    snapped = [
        LevelTable(
            table.kind, table.groups, (value / step).round().clamp(-127, 127).to(torch.int8), scale
        )
        for table, value in zip(tables, values, strict=True)
    ]
    return snapped[0], snapped[1] if len(snapped) > 1 else None


def _with_zero(levels: LevelTable) -> Tensor:
    """What codes 0, 1, ... mean, float32 `(rows, ngroups, 1 + L)`."""
    return torch.nn.functional.pad(levels.values(), (1, 0))


def _scaled(levels: LevelTable, group: int, factors: Tensor) -> Tensor:
    """What codes 0, 1, ... mean in each column of a group, float32 `(rows, b, 1 + L)`."""
    params = levels.params[:, group].float()
    count = params.shape[1]
    factors = factors[:count].T  # (b, S)
    factors = torch.nn.functional.pad(factors, (0, count - factors.shape[1]), value=1.0)
    values = LEVEL_KINDS[levels.kind].expand(params.unsqueeze(1) * factors, levels.groups)
    return torch.nn.functional.pad(values, (1, 0))


def _look_up(table: Tensor, index: Tensor, group_size: int) -> Tensor:
    """Entry `index[r, c]` of row r and the group of column c, float32 `(rows, cols)`."""
    rows, ngroups = table.shape[:2]
    cols = index.shape[1]
    size = min(group_size, cols)  # a group wider than the matrix would only be padded for nothing
    padded = torch.nn.functional.pad(index, (0, ngroups * size - cols)).view(rows, ngroups, size)
    return table.gather(-1, padded).view(rows, -1)[:, :cols]
