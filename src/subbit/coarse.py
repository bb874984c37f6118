"""The coarse stage: how many of every M weights each linear keeps.

By block, by a rule of the papers (`prune/allocate.py`), or by linear, by measured damage: what
compressing a linear alone does to the model's last hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from subbit.linalg import GramAccumulator
from subbit.methods import LinearStats, Method
from subbit.model import (
    BlockCall,
    Blocks,
    block_similarities,
    capture_inputs,
    in_float32,
    run_block,
    weight_of,
)
from subbit.prune.allocate import allocate, allocate_measured, mean_kept
from subbit.recipe import Recipe

__all__ = ["CoarseStage", "Kept"]

Kept = list[dict[str, int]]
"""Of every block, linear -> N."""

Advance = Callable[[int], None] | None
Linears = list[dict[str, nn.Module]]

_WINDOWS = 4  # that H comes from when damage is measured; the damage itself is seen on the first


@dataclass
class CoarseStage:
    """The model before anything is compressed, and how the budget is to be shared.

    Attributes:
        linears: those to be compressed, of every block.
        hidden: hidden states `(nsamples, seqlen, width)` entering the first block; not changed.
        method: compresses a linear, where damage is measured.
    """

    recipe: Recipe
    blocks: Blocks
    calls: list[BlockCall]
    hidden: Tensor
    linears: Linears
    method: Method
    device: torch.device

    @property
    def steps(self) -> int:
        """Windows that are run through a block."""
        count = len(self.blocks.modules)
        if self.recipe.nm is None:
            return 0
        allocation = self.recipe.coarse.allocation
        if allocation == "layer_importance":
            return count * len(self.hidden)
        if allocation != "measured":
            return 0
        suffixes = sum(len(self.linears[i]) * (count - i) for i in range(count))
        return count * (2 + len(self._few)) + suffixes

    def look(self, advance: Advance = None) -> dict[str, Any]:
        """What has to be measured for the allocation, as plain JSON; {} where nothing has.

        Args:
            advance: called with the number of windows that were run through a block.
        """
        if self.steps == 0:
            return {}
        if self.recipe.coarse.allocation == "layer_importance":
            found = block_similarities(
                self.blocks, self.calls, self.hidden, device=self.device, advance=advance
            )
            return {"block_similarities": found}
        return self._measured(advance)

    def kept(self, facts: dict[str, Any]) -> tuple[Kept, float]:
        """N of every linear, from what `look` has found, and their weighted mean."""
        spec, nm = self.recipe.coarse, self.recipe.nm
        sizes = [[weight_of(m).numel() for m in block.values()] for block in self.linears]
        flat = list(chain.from_iterable(sizes))
        if spec.allocation == "measured":
            own = allocate_measured(
                facts["damages"], facts["losses"], flat, nm, n_high=spec.n_high, n_low=spec.n_low
            )
        else:
            blocks = allocate(
                facts.get("block_similarities", []),
                list(map(sum, sizes)),
                nm,
                allocation=spec.allocation,
                n_high=spec.n_high,
                n_low=spec.n_low,
                norms=[_norm(block) for block in self.linears],
            )
            own = [n for n, block in zip(blocks, self.linears, strict=True) for _ in block]
        names = [(i, name) for i, block in enumerate(self.linears) for name in block]
        kept: Kept = [{} for _ in self.linears]
        for (i, name), n in zip(names, own, strict=True):
            kept[i][name] = n
        return kept, mean_kept(own, flat)

    @property
    def _middle(self) -> int:
        """The middle one of the blocks that have linears to compress."""
        having = [i for i, own in enumerate(self.linears) if own]
        return having[len(having) // 2]

    @property
    def _few(self) -> Tensor:
        return self.hidden[:_WINDOWS]

    def _measured(self, advance: Advance) -> dict[str, Any]:
        """One walk through the model.

        "damages": relative change of the last hidden states when each linear alone is compressed;
        "losses": mean loss of the linears of the middle block that keep 1, 2, ... M of M.
        """
        entering = [self.hidden[:1].float()]
        for i in range(len(self.blocks.modules)):
            entering.append(self._run_exactly(i, entering[-1]))
            _say(advance, 1)
        hidden, damages, losses = self._few.clone(), [], []
        for i, block in enumerate(self.blocks.modules):
            grams = self._grams(i, hidden, advance)
            if i == self._middle:
                losses = self._losses(i, grams)
            for name, linear in self.linears[i].items():
                weight, _ = self._compressed(i, name, grams[name], self.recipe.nm[0])
                damages.append(self._damage(i, linear, weight, entering))
                _say(advance, len(self.blocks.modules) - i)
            run_block(block, hidden, self.calls[i], out=hidden, device=self.device)
            _say(advance, 1)
        return {"losses": losses, "damages": damages}

    def _losses(self, i: int, grams: dict[str, GramAccumulator]) -> list[float]:
        def mean_loss(n: int) -> float:
            losses = [self._compressed(i, name, gram, n)[1] for name, gram in grams.items()]
            return sum(losses) / len(losses)

        return [mean_loss(n) for n in range(1, self.recipe.nm[1] + 1)]

    def _grams(self, i: int, hidden: Tensor, advance: Advance) -> dict[str, GramAccumulator]:
        return capture_inputs(
            self.blocks.modules[i],
            hidden,
            self.calls[i],
            self.linears[i],
            lambda features: GramAccumulator(features, self.device),
            device=self.device,
            advance=advance,
        )

    def _compressed(self, i: int, name: str, gram: GramAccumulator, n: int) -> tuple[Tensor, float]:
        """The dense weight `(rows, cols)` that the method makes of a linear, and its loss."""
        W = weight_of(self.linears[i][name]).to(self.device, torch.float32)
        stats = LinearStats(gram.H, gram.tokens, f"{self.blocks.name(i)}.{name}", gram.mean)
        result = self.method.compress(W, stats, (n, self.recipe.nm[1]))
        return result.dequantize(), result.record["loss"]

    @torch.no_grad()
    def _damage(self, i: int, linear: nn.Module, weight: Tensor, entering: list[Tensor]) -> float:
        original = weight_of(linear).clone()
        weight_of(linear).copy_(weight.to(original))
        try:
            x = entering[i]
            for k in range(i, len(self.blocks.modules)):
                x = self._run_exactly(k, x)
        finally:
            weight_of(linear).copy_(original)  # not the tensor of before: see `in_float32`
        last = entering[-1]
        change = (x - last).square().sum(-1) / last.square().sum(-1).clamp_min(1e-30)
        return float(change.mean())

    def _run_exactly(self, i: int, hidden: Tensor) -> Tensor:
        """Run block i in float32: what a small linear does is less than bfloat16 rounds away.

        It is cast for each run, so that memory never holds more than one block in float32.
        """
        with in_float32(self.blocks.modules[i]):
            return run_block(
                self.blocks.modules[i], hidden, self.calls[i].float(), device=self.device
            )


def _say(advance: Advance, windows: int) -> None:
    if advance:
        advance(windows)


def _norm(linears: dict[str, nn.Module]) -> float:
    """L2 norm of the weights of some linears."""
    squares = (weight_of(m).float().square().sum(dtype=torch.float64) for m in linears.values())
    return float(sum(squares)) ** 0.5
