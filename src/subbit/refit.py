"""Tune what is not a code: levels, norms and biases of one compressed block, by gradients.

Block-wise reconstruction after the codes are settled, opt-in (`refit.steps` in a recipe): Adam on
the distance between what the compressed block puts out and what the original one did.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from subbit.codes import LEVEL_KINDS, CompressedLinear, LevelTable, on_int8_grid
from subbit.errors import FormatError
from subbit.model import BlockCall, replace_module
from subbit.model.capture import placed
from subbit.packed.linear import PackedLinear, dense_cache
from subbit.recipe import RefitSpec

__all__ = ["Refit", "loose_tensors", "refit_block"]

Advance = Callable[[int], None] | None

_JUDGED = 8  # windows by which the outcome is judged


@dataclass(frozen=True)
class Refit:
    """What tuning a block did.

    Attributes:
        before, after: error of the block over the first windows, relative to the size of every
            token's hidden states; the tuned values are taken where they lower it.
        steps: steps of Adam.
    """

    before: float
    after: float
    steps: int


def loose_tensors(block: nn.Module, linears: list[str]) -> dict[str, nn.Parameter]:
    """The parameters of a block that refitting may change beside levels: vectors (norms, biases).

    Args:
        block: a decoder block.
        linears: names of its packed linears; of these only the bias counts.
    """
    packed = {f"{name}." for name in linears}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1
        and parameter.is_floating_point()
        and (name.endswith(".bias") or not any(name.startswith(prefix) for prefix in packed))
    }


def refit_block(
    block: nn.Module,
    linears: list[str],
    hidden: Tensor,
    target: Tensor,
    call: BlockCall,
    spec: RefitSpec,
    *,
    device: torch.device,
    advance: Advance = None,
) -> Refit:
    """Tune levels, norms and biases of a block in place, its packed linears made anew.

    Deterministic: windows come in order, and nothing is drawn.

    Args:
        block: the compressed block.
        linears: names of its `PackedLinear`s.
        hidden: hidden states `(nsamples, seqlen, width)` of the compressed model entering it.
        target: what it is to put out, same shape.
        call: its other arguments.
        spec: steps and learning rate.
        device: where the work is done.
        advance: called with 1 after every step.
    """
    packed = {name: block.get_submodule(name) for name in linears}
    loose = loose_tensors(block, linears)
    old = {name: parameter.detach().clone() for name, parameter in loose.items()}
    with placed(block, device) as place:
        job = _Job(block, hidden, target, call.to(place))
        before = job.error()
        tuned = {name: _Tuned(module) for name, module in packed.items()}
        _put(block, tuned)
        try:
            masters = job.descend(tuned, loose, spec, advance)
            fitted = {name: module.repacked() for name, module in tuned.items()}
        except FormatError:  # levels that have run away
            fitted, masters = {}, old
        finally:
            _put(block, packed)
        _put(block, fitted)
        _set(block, masters)
        after = job.error()
        if not after < before:  # also where it is NaN
            _put(block, packed)
            _set(block, old)
            after = before
    return Refit(before, after, spec.steps)


class _Job:
    """A block, what enters it and what is to leave it."""

    def __init__(self, block: nn.Module, hidden: Tensor, target: Tensor, call: BlockCall) -> None:
        self.block, self.hidden, self.target, self.call = block, hidden, target, call

    @torch.no_grad()
    def error(self) -> float:
        """Mean relative error over the first windows."""
        count = min(len(self.hidden), _JUDGED)
        with dense_cache(self.block):
            return sum(float(self._distance(n, {})) for n in range(count)) / count

    def descend(
        self,
        tuned: dict[str, "_Tuned"],
        loose: dict[str, nn.Parameter],
        spec: RefitSpec,
        advance: Advance,
    ) -> dict[str, Tensor]:
        """Adam with a cosine schedule, a window a step; the vectors as they end up."""
        masters = {name: nn.Parameter(p.detach().float()) for name, p in loose.items()}
        learning = [*masters.values(), *(p for m in tuned.values() for p in m.learning())]
        # a step moves a number by its tensor's own size times the rate
        groups = [{"params": [p], "lr": spec.rate * _size(p)} for p in learning]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, spec.steps)
        with torch.enable_grad():
            for step in range(spec.steps):
                adam.zero_grad()
                self._distance(step % len(self.hidden), masters).backward()
                adam.step()
                schedule.step()
                if advance:
                    advance(1)
        return {name: master.detach() for name, master in masters.items()}

    def _distance(self, n: int, masters: dict[str, Tensor]) -> Tensor:
        """Error of window n: mean over tokens of |out - target|^2 / |target|^2."""
        vectors = {k: master.to(self.block.get_parameter(k).dtype) for k, master in masters.items()}

        def block(*args: object, **kwargs: object) -> object:
            return torch.func.functional_call(self.block, vectors, args, kwargs)

        place = next(self.block.parameters()).device
        out = self.call.run(block, self.hidden[n : n + 1].to(place, copy=True))[0].float()
        target = self.target[n].to(place).float()
        size = target.square().sum(-1)
        least = 0.1 * size.median() + torch.finfo(torch.float32).tiny
        return ((out - target).square().sum(-1) / torch.maximum(size, least)).mean()


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt()) or 1.0


def _put(block: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        replace_module(block, name, module)


@torch.no_grad()
def _set(block: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        block.get_parameter(name).copy_(value)


class _Tuned(nn.Module):
    """A packed linear whose level parameters are float32 and learn; its codes stay."""

    def __init__(self, module: PackedLinear) -> None:
        super().__init__()
        self.linear = module.compressed()
        self.bias = module.bias
        self.tables = nn.ModuleDict()
        if isinstance(self.linear, CompressedLinear):
            self.tables["levels"] = _Params(self.linear.levels)
            if self.linear.salient_levels is not None:
                self.tables["salient_levels"] = _Params(self.linear.salient_levels)

    def learning(self) -> list[nn.Parameter]:
        """What of it learns; the bias does so by itself."""
        return list(self.tables.parameters())

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

    def __init__(self, table: LevelTable) -> None:
        super().__init__()
        self.kind, self.groups = table.kind, table.groups
        if table.scale is not None:
            self.kind, self.groups = "free", table.count
        values = table.params.float() if table.scale is None else table.values()
        whole = LEVEL_KINDS[self.kind].integers
        self.register_buffer("fixed", values[..., values.shape[-1] - whole :].clone())
        self.params = nn.Parameter(values[..., : values.shape[-1] - whole].clone())

    def table(self) -> LevelTable:
        return LevelTable(self.kind, self.groups, torch.cat((self.params, self.fixed), -1))

    def stored(self) -> LevelTable:
        table = self.table()
        return replace(table, params=table.params.detach().half())


def _back_on_grid(
    linear: CompressedLinear, levels: LevelTable, salient_levels: LevelTable | None = None
) -> dict[str, LevelTable]:
    """Levels that learned as free ones as int8 levels of the kind they were."""
    tables = on_int8_grid(levels, salient_levels)
    like = {"levels": linear.levels, "salient_levels": linear.salient_levels}
    return {
        name: replace(table, kind=old.kind, groups=old.groups)
        for (name, old), table in zip(like.items(), tables)
        if old is not None and table is not None
    }
