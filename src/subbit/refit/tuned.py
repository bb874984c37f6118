"""What may learn once codes are settled (levels, norms and biases), and how it is made to."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable, on_int8_grid, row_scale
from subbit.errors import FormatError
from subbit.model import replace_module
from subbit.packed.linear import PackedLinear

__all__ = ["JUDGED", "Learner", "Refit", "loose_tensors", "tune"]

JUDGED = 8  # windows by which the outcome is judged
_SLOW = 0.2  # how fast levels learn by themselves where a factor for all of them learns too


@dataclass(frozen=True)
class Refit:
    """What tuning did.

    Attributes:
        before, after: error over the first windows. Of a block: relative to the size of every
            token's hidden states; of a model: KL divergence from the original model's next-token
            distribution, in nats. The tuned values are taken where they lower it.
        steps: steps of Adam.
    """

    before: float
    after: float
    steps: int


class Job(Protocol):
    """A block or a model on which `tune` works."""

    steps: int

    def error(self) -> float:
        """How far it is from what it should put out, as it stands."""

    def descend(self) -> None:
        """Learn, `steps` steps."""

    def settle(self) -> bool:
        """Put what was learned in place as it is stored; False if it cannot be."""

    def restore(self) -> None:
        """Put everything back as it was."""


def tune(job: Job) -> Refit:
    """Let a job learn, and keep what it learned only if its error falls."""
    before = job.error()
    try:
        job.descend()
    except BaseException:
        job.restore()
        raise
    after = job.error() if job.settle() else before
    if not after < before:  # also where it is NaN
        job.restore()
        after = before
    return Refit(before, after, job.steps)


def loose_tensors(
    block: nn.Module, linears: Iterable[str], frozen: Container[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters of a block that refitting may change beside levels: vectors (norms, biases).

    Args:
        block: a decoder block.
        linears: names of its packed linears; of these only the bias counts.
        frozen: names of parameters that are to stay as they are.
    """
    packed = {f"{name}." for name in linears}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if name not in frozen
        and parameter.dim() == 1
        and parameter.is_floating_point()
        and (name.endswith(".bias") or not any(name.startswith(prefix) for prefix in packed))
    }


class Learner:
    """A compressed block while its levels, norms and biases learn in float32.

    From `begin` until `settle` or `restore` the block holds linears that can learn in the place of
    its `PackedLinear`s.

    Args:
        block: the compressed block.
        linears: names of its packed linears.
        frozen: names of parameters that do not learn.
        by_factor: the parameters of a level record learn as a factor for all of them, and each by
            itself a fifth as fast.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Iterable[str],
        frozen: Container[str] = (),
        by_factor: bool = False,
    ) -> None:
        self.block, self.by_factor = block, by_factor
        self.packed = {name: block.get_submodule(name) for name in linears}
        loose = loose_tensors(block, self.packed, frozen)
        self._old = {name: parameter.detach().clone() for name, parameter in loose.items()}
        self._masters: dict[str, nn.Parameter] = {}
        self._tuned: dict[str, _Tuned] = {}

    def begin(self) -> list[nn.Parameter]:
        """Put linears that learn in place; returns all that learns."""
        self._masters = {
            name: nn.Parameter(p.to(torch.float32, copy=True)) for name, p in self._old.items()
        }
        self._tuned = {name: _Tuned(module, self.by_factor) for name, module in self.packed.items()}
        self._put(self._tuned)
        return [*self._masters.values(), *(p for m in self._tuned.values() for p in m.learning())]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The block with the vectors as they are now."""
        vectors = {k: master.to(self.block.get_parameter(k)) for k, master in self._masters.items()}
        return torch.func.functional_call(self.block, vectors, args, kwargs)

    def settle(self) -> bool:
        """Round what was learned as it is stored and put it in place; False if it cannot be."""
        try:
            fitted = {name: module.repacked() for name, module in self._tuned.items()}
        except FormatError:  # levels that have run away
            return False
        self._put(fitted)
        self._set({name: master.detach() for name, master in self._masters.items()})
        return True

    def restore(self) -> None:
        """Put the block back as it was."""
        self._put(self.packed)
        self._set(self._old)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            replace_module(self.block, name, module)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.block.get_parameter(name).copy_(value)


class _Tuned(nn.Module):
    """A packed linear whose level parameters are float32 and learn; its codes stay."""

    def __init__(self, module: PackedLinear, by_factor: bool) -> None:
        super().__init__()
        self.linear = module.compressed()
        self.bias = module.bias
        self.tables = nn.ModuleDict()
        if isinstance(self.linear, CompressedLinear):
            self.tables["levels"] = _Params(self.linear.levels, by_factor)
            if self.linear.salient_levels is not None:
                self.tables["salient_levels"] = _Params(self.linear.salient_levels, by_factor)

    def learning(self) -> list[nn.Parameter]:
        """What of it learns; the bias does so by itself."""
        return list(self.tables.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Tuned":
        super()._apply(fn, recurse)  # the codes go where the parameters go
        held = {f.name: getattr(self.linear, f.name) for f in fields(self.linear)}
        moved = {name: fn(value) for name, value in held.items() if isinstance(value, Tensor)}
        self.linear = replace(self.linear, **moved)
        return self

    def forward(self, x: Tensor) -> Tensor:
        tables = {name: params.table() for name, params in self.tables.items()}
        weight = replace(self.linear, **tables).dequantize().to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def repacked(self) -> PackedLinear:
        """The linear with its levels rounded as they are stored."""
        tables = {name: params.stored() for name, params in self.tables.items()}
        if tables and self.linear.levels.scale is not None:
            tables = _back_on_grid(self.linear, **tables)
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return PackedLinear.from_compressed(replace(self.linear, **tables), self.bias, dtype)


class _Params(nn.Module):
    """The parameters of a level table as they learn; int8 levels learn as free ones."""

    def __init__(self, table: LevelTable, by_factor: bool) -> None:
        super().__init__()
        self.kind, self.groups = table.kind, table.groups
        if table.scale is not None:
            self.kind, self.groups = "free", table.count
        values = table.params.float() if table.scale is None else table.values()
        whole = LEVEL_KINDS[self.kind].integers
        self.register_buffer("fixed", values[..., values.shape[-1] - whole :].clone())
        values = values[..., : values.shape[-1] - whole].clone()
        self.by_factor = by_factor and values.shape[-1] > 1
        if self.by_factor:
            self.register_buffer("start", values)
            unit = values.square().mean(-1, keepdim=True).sqrt()
            self.register_buffer("slow", _SLOW * unit)
            self.factor = nn.Parameter(torch.ones_like(unit))
            self.change = nn.Parameter(torch.zeros_like(values))
        else:
            self.params = nn.Parameter(values)

    def table(self) -> LevelTable:
        if self.by_factor:
            params = self.start * self.factor + self.slow * self.change
        else:
            params = self.params
        return LevelTable(self.kind, self.groups, torch.cat((params, self.fixed), -1))

    def stored(self) -> LevelTable:
        table = self.table()
        return replace(table, params=table.params.detach().half())


def _back_on_grid(
    linear: CompressedLinear, levels: LevelTable, salient_levels: LevelTable | None = None
) -> dict[str, LevelTable]:
    """Levels that learned as free ones as int8 levels of the kind they were."""
    scale = None
    if linear.levels.scale.shape[1] == 1:
        present = [table for table in (levels, salient_levels) if table is not None]
        scale = row_scale(torch.cat([table.values().flatten(1) for table in present], 1))
    tables = on_int8_grid(levels, salient_levels, scale)
    like = {"levels": linear.levels, "salient_levels": linear.salient_levels}
    return {
        name: replace(table, kind=old.kind, groups=old.groups)
        for (name, old), table in zip(like.items(), tables)
        if old is not None and table is not None
    }
