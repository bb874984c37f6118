"""Codes and levels of a block improved together: joint level solve, descent, mask re-chosen.

Everything lowers `sum_rows (w - q) S (w - q)^T` and nothing raises it. Not in any paper; see
docs/methods.md, `pbs2p-plus`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    def offsets(self) -> Tensor:
        """Where each column's table begins among the T entries, int64 `(b,)`."""
        kind, groups = self.tables[0]
        return self.salient.long() * (1 + groups * LEVEL_KINDS[kind].levels_per_group)

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
    basis = coding.basis()
    V = basis.T[coding.codes + coding.offsets()].mT  # (rows, P, b)
    VS = V @ S
    A = VS @ V.mT
    c = (VS @ (W - coding.values()).unsqueeze(-1)).squeeze(-1)
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    hold = ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(A.dtype).tiny
    A = A + torch.diag_embed(hold.expand_as(diagonal))
    step, info = torch.linalg.solve_ex(A, c)
    sound = (info == 0) & torch.isfinite(step).all(-1)
    return replace(coding, params=coding.params + step.masked_fill(~sound.unsqueeze(-1), 0.0))


def sweep(W: Tensor, S: Tensor, coding: Coding, m: int, remask: bool) -> Coding:
    """One pass of coordinate descent over the columns, group by group.

    Every kept weight takes the level nearest to its conditional optimum `q_c + (R S)_c / S_cc`;
    with `remask`, first the best exchange of a kept and a pruned weight of each group, where one
    lowers the objective.
    """
    levels = (coding.params @ coding.basis()).T.contiguous()  # (T, rows)
    offsets = coding.offsets()
    codes = coding.codes.T.clone()  # (b, rows): a column is contiguous
    q = levels.gather(0, codes + offsets[:, None])
    RS = (S @ (W.T - q)).contiguous()  # (b, rows), S is symmetric
    sizes = [1 + g * LEVEL_KINDS[k].levels_per_group for k, g in coding.tables]
    tables = [levels[1 : sizes[0]]]
    if len(sizes) > 1:
        tables.append(levels[sizes[0] + 1 :])
    table_of = [tables[int(s)] for s in coding.salient.tolist()]
    for start in range(0, len(codes), m):
        stop = min(start + m, len(codes))
        group = _Group(codes, q, RS, S, table_of, start, stop)
        before = q[start:stop].clone()
        if remask:
            group.exchange()
        group.descend()
        change = q[start:stop] - before
        local = RS[start:stop].clone()
        RS.addmm_(S[:, start:stop], change, alpha=-1)
        RS[start:stop] = local  # these were kept up to date inside the group
    return replace(coding, codes=codes.T.contiguous())


class _Group:
    """M consecutive columns of a sweep; all tensors `(columns, rows)`, changed in place."""

    def __init__(
        self,
        codes: Tensor,
        q: Tensor,
        RS: Tensor,
        S: Tensor,
        table_of: list[Tensor],
        start: int,
        stop: int,
    ) -> None:
        self.codes, self.q, self.RS = codes[start:stop], q[start:stop], RS[start:stop]
        self.S = S[start:stop, start:stop]
        self.curvature = self.S.diagonal().clamp_min(torch.finfo(S.dtype).tiny)
        self.tables = table_of[start:stop]

    def descend(self) -> None:
        """Give every kept weight the level nearest to its conditional optimum."""
        for c, table in enumerate(self.tables):
            target = self.q[c] + self.RS[c] / self.curvature[c]
            code, value = _nearest(table, target)
            kept = self.codes[c] > 0
            self._set(c, torch.where(kept, code, 0), torch.where(kept, value, 0.0))

    def exchange(self) -> None:
        """Prune one kept weight and keep a pruned one instead, where that pays most.

        Pruning i costs `2 q_i (RS)_i + q_i^2 S_ii` and moves `(RS)_j` by `q_i S_ij`; keeping j at
        level v then gains `S_jj (t^2 - (t - v)^2)` with `t = (RS)_j / S_jj`.
        """
        kept = self.codes > 0
        cost = self.q * (2 * self.RS + self.q * self.curvature[:, None])  # (g, rows)
        size, rows = self.codes.shape
        best = torch.zeros(rows, dtype=self.q.dtype, device=self.q.device)
        out = torch.full((rows,), -1, dtype=torch.long, device=self.q.device)
        into, new = out.clone(), out.clone()
        value = torch.zeros_like(best)
        for j, table in enumerate(self.tables):
            t = (self.RS[j] + self.q * self.S[:, j, None]) / self.curvature[j]  # (g, rows): i gone
            code, v = _nearest(table, t)
            change = cost - self.curvature[j] * (t.square() - (t - v).square())
            change = change.masked_fill(~kept | kept[j], torch.inf)
            least, i = change.min(0)
            better = least < best
            best = torch.where(better, least, best)
            out, into = torch.where(better, i, out), torch.where(better, j, into)
            new = torch.where(better, code.gather(0, i[None])[0], new)
            value = torch.where(better, v.gather(0, i[None])[0], value)
        moved = out >= 0
        zero = torch.zeros_like(value)
        for c in range(size):
            leaves, enters = moved & (out == c), moved & (into == c)
            code = torch.where(enters, new, torch.where(leaves, 0, self.codes[c]))
            self._set(c, code, torch.where(enters, value, torch.where(leaves, zero, self.q[c])))

    def _set(self, c: int, code: Tensor, value: Tensor) -> None:
        change = value - self.q[c]
        self.codes[c] = code
        self.q[c] = value
        self.RS.addr_(self.S[:, c], change, alpha=-1)


def _nearest(table: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The code (1-based) and value of the level nearest to `target`; the first one on a tie.

    Args:
        table: `(L, rows)`.
        target: `(..., rows)`.
    """
    value = table[0].expand_as(target)
    code = torch.ones_like(target, dtype=torch.long)
    distance = (target - value).abs()
    for level in range(1, len(table)):
        other = (target - table[level]).abs()
        closer = other < distance
        distance = torch.where(closer, other, distance)
        value = torch.where(closer, table[level], value)
        code = torch.where(closer, level + 1, code)
    return code, value
