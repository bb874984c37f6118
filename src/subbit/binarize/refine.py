"""Codes and levels of a block improved together: joint level solve, descent, mask re-chosen.

Everything lowers `sum_rows (w - q) S (w - q)^T` and nothing raises it. Not in any paper; see
docs/methods.md, `pbs2p-plus`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbit.binarize import descent
from subbit.codes import LEVEL_KINDS

__all__ = ["Coding", "objective", "refine", "solve_levels", "sweep"]


@dataclass(frozen=True)
class Coding:
    """A block as codes and real-valued level parameters.

    Attributes:
        codes: int64 `(rows, b)`; 0 = pruned, c = level c - 1 of the column's table.
        params: float32 `(rows, P)`: parameters of the ordinary table, then of the salient one.
        tables: `(kind, groups)` of the ordinary and, if there are salient columns, their table.
        salient: bool `(b,)`.
    """

    codes: Tensor
    params: Tensor
    tables: tuple[tuple[str, int], ...]
    salient: Tensor

    def basis(self) -> Tensor:
        """How level values depend on the parameters, `(P, T)`; T: 0, levels, 0, salient levels."""
        parts = []
        for kind, groups in self.tables:
            eye = torch.eye(groups * LEVEL_KINDS[kind].params_per_group, device=self.params.device)
            values = LEVEL_KINDS[kind].expand(eye, groups)
            parts.append(torch.cat((values.new_zeros(len(values), 1), values), 1))
        return torch.block_diag(*parts)

    def counts(self) -> list[int]:
        """Number of levels of each table."""
        return [groups * LEVEL_KINDS[kind].levels_per_group for kind, groups in self.tables]

    def offsets(self) -> Tensor:
        """Where each column's table begins among the T entries, int64 `(b,)`."""
        return self.salient.long() * (1 + self.counts()[0])

    def values(self) -> Tensor:
        """What the codes mean, float32 `(rows, b)`."""
        return (self.params @ self.basis()).gather(1, self.codes + self.offsets())


def objective(W: Tensor, S: Tensor, coding: Coding) -> Tensor:
    """`(w - q) S (w - q)^T` of every row."""
    R = W - coding.values()
    return ((R @ S) * R).sum(-1)


def refine(
    W: Tensor,
    S: Tensor,
    coding: Coding,
    nm: tuple[int, int],
    *,
    sweeps: int,
    remask: bool,
    ridge: float = 1e-3,
) -> Coding:
    """Alternate joint level solves and descent sweeps.

    Args:
        W: float32 `(rows, b)`, the target.
        S: `(b, b)`, positive semi-definite.
        coding: the start.
        nm: `(N, M)`.
        sweeps: sweeps over the columns; 0 changes nothing.
        remask: let pruned and kept weights of a group change places.
        ridge: see `solve_levels`.
    """
    for _ in range(sweeps):
        coding = solve_levels(W, S, coding, ridge)
        coding = sweep(W, S, coding, nm[1], remask)
    return solve_levels(W, S, coding, ridge) if sweeps else coding


def solve_levels(W: Tensor, S: Tensor, coding: Coding, ridge: float) -> Coding:
    """Solve for all level parameters of a row at once.

    `q` is linear in the parameters, so with planes V the step is
    `(V S V^T + ridge * mean diag)^-1 V S (w - q)`: the ridge holds on to the parameters there are,
    so that empty or collinear planes are harmless and the objective cannot rise.
    """
    A, c = _normal_equations(W, S, coding)
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    hold = ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(A.dtype).tiny
    A = A + torch.diag_embed(hold.expand_as(diagonal))
    step, info = torch.linalg.solve_ex(A, c)
    sound = (info == 0) & torch.isfinite(step).all(-1)
    return replace(coding, params=coding.params + step.masked_fill(~sound.unsqueeze(-1), 0.0))


def _normal_equations(W: Tensor, S: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """`V S V^T` `(rows, P, P)` and `V S (w - q)` `(rows, P)` for the planes V of every row."""
    basis = coding.basis()
    entries = coding.codes + coding.offsets()  # (rows, b)
    R = W - coding.values()
    counts = coding.counts()
    if descent.available(coding.codes.T, 1, counts):
        entry = entries.to(torch.uint8).masked_fill(coding.codes == 0, 255)
        A, c = descent.level_gram(entry, R @ S, S, basis.shape[1])
        return basis @ A @ basis.T, c @ basis.T
    V = basis.T[entries].mT  # (rows, P, b)
    VS = V @ S
    return VS @ V.mT, (VS @ R.unsqueeze(-1)).squeeze(-1)


def sweep(W: Tensor, S: Tensor, coding: Coding, m: int, remask: bool) -> Coding:
    """One pass of coordinate descent over the columns, group by group.

    Every kept weight takes the level nearest to its conditional optimum `q_c + (R S)_c / S_cc`;
    with `remask`, first the best exchange of a kept and a pruned weight of each group, where one
    lowers the objective.
    """
    levels = (coding.params @ coding.basis()).T.contiguous()  # (T, rows)
    codes = coding.codes.T.contiguous()  # (b, rows): a column is contiguous
    q = levels.gather(0, codes + coding.offsets()[:, None])
    RS = S @ (W.T - q)  # S is symmetric
    counts = coding.counts()
    tables = [_Table(part[1:]) for part in levels.split([1 + count for count in counts])]
    if descent.available(codes, m, counts):
        sorted_levels = [(table.values, table.order) for table in tables]
        codes = descent.sweep_columns(codes, q, RS, S, sorted_levels, coding.salient, m, remask)
        return replace(coding, codes=codes.T.contiguous())
    table_of = [tables[int(flag)] for flag in coding.salient.tolist()]
    for start in range(0, len(codes), m):
        stop = min(start + m, len(codes))
        group = _Group(codes, q, RS, S, table_of, start, stop)
        before = q[start:stop].clone()
        if remask:
            group.exchange()
        group.descend()
        RS.addmm_(S[:, start:stop], q[start:stop] - before, alpha=-1)
    return replace(coding, codes=codes.T.contiguous())


class _Table:
    """The levels of every row, sorted, so that the middles between neighbours decide.

    Args:
        levels: `(L, rows)`.
    """

    def __init__(self, levels: Tensor) -> None:
        self.values, self.order = levels.sort(dim=0, stable=True)
        self.middles = (self.values[1:] + self.values[:-1]) / 2

    def nearest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Code (1-based) and value of the level nearest to `target` `(..., rows)`."""
        shape = (len(self.middles), *[1] * (target.ndim - 1), target.shape[-1])
        index = (target > self.middles.view(shape)).sum(0)
        flat = index.view(-1, target.shape[-1])
        code = self.order.gather(0, flat).view(target.shape) + 1
        return code, self.values.gather(0, flat).view(target.shape)


class _Group:
    """M consecutive columns of a sweep; codes and q are views `(columns, rows)`, changed in place.

    Its rows of RS are a copy that is kept up to date while the group is worked on.
    """

    def __init__(
        self,
        codes: Tensor,
        q: Tensor,
        RS: Tensor,
        S: Tensor,
        table_of: list[_Table],
        start: int,
        stop: int,
    ) -> None:
        self.codes, self.q, self.RS = codes[start:stop], q[start:stop], RS[start:stop].clone()
        self.S = S[start:stop, start:stop]
        self.curvature = self.S.diagonal().clamp_min(torch.finfo(S.dtype).tiny)
        self.tables = table_of[start:stop]

    def descend(self) -> None:
        """Give every kept weight the level nearest to its conditional optimum."""
        kept = self.codes > 0
        for c, table in enumerate(self.tables):
            code, value = table.nearest(self.q[c] + self.RS[c] / self.curvature[c])
            value = value * kept[c]
            self.RS.addr_(self.S[:, c], value - self.q[c], alpha=-1)
            self.codes[c] = code * kept[c]
            self.q[c] = value

    def exchange(self) -> None:
        """Prune one kept weight and keep a pruned one instead, where that pays most.

        Pruning i costs `2 q_i (RS)_i + q_i^2 S_ii` and moves `(RS)_j` by `q_i S_ij`; keeping j at
        level v then gains `S_jj (t^2 - (t - v)^2)` with `t = (RS)_j / S_jj`.
        """
        kept = self.codes > 0
        size, rows = self.codes.shape
        cost = self.q * (2 * self.RS + self.q * self.curvature[:, None])  # (i, rows)
        # (j, i, rows): conditional optimum of j once i is gone
        t = self.RS[:, None] + self.S[:, :, None] * self.q[None]
        t = t / self.curvature[:, None, None]
        nearest = [table.nearest(target) for table, target in zip(self.tables, t)]
        code, v = (torch.stack(parts) for parts in zip(*nearest))
        change = cost[None] - self.curvature[:, None, None] * (v * (2 * t - v))
        change = change.masked_fill(~kept[None] | kept[:, None], torch.inf)
        least, pair = change.view(-1, rows).min(0)
        moved = least < 0
        into, out = pair // size, pair % size
        column = torch.arange(size, device=pair.device)[:, None]
        enters, leaves = moved & (column == into), moved & (column == out)
        pick = pair[None]
        new_code, new_value = code.view(-1, rows).gather(0, pick), v.view(-1, rows).gather(0, pick)
        q = torch.where(enters, new_value, self.q * ~leaves)
        self.RS.addmm_(self.S, q - self.q, alpha=-1)
        self.codes.copy_(torch.where(enters, new_code, self.codes * ~leaves))
        self.q.copy_(q)
