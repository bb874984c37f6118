"""What the linears of one block after the other are calibrated on, and what they are to become.

Plainly (`capture_inputs`) all linears of a block see the block as it was, given the outputs of the
compressed blocks before it. With `calibration.sequential` a linear sees what the compressed linears
before it in its own block give; with `asymmetry` the original model runs beside, and a linear's
target moves towards the original's outputs; with `calibration.tokens` and `first_token` some tokens
count more than others. `refit` needs to know what the original block puts out.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import repeat

import torch
from torch import Tensor, nn

from subbit.errors import RecipeError
from subbit.linalg import GramAccumulator, PairAccumulator, shifted_target
from subbit.model import (
    BlockCall,
    Blocks,
    capture_inputs,
    check_all_ran,
    find_linears,
    look_at_windows,
    run_block,
    wiring,
)
from subbit.model.pairs import Look, Wiring
from subbit.recipe import Recipe

__all__ = ["Calibrator", "Statistics"]

Advance = Callable[[int], None] | None
Statistics = dict[str, GramAccumulator]


class Calibrator:
    """The calibration tokens on their way through the model.

    Args:
        gradients: what every token counts by block and linear (`model.TokenGradients`), or None.

    Attributes:
        hidden: hidden states `(nsamples, seqlen, width)` of the compressed model that enter the
            block at hand, on the CPU.
        originals: those of the original model; None where nobody compares. Once `rounds` of a
            block has ended they are what the original block puts out.
    """

    def __init__(
        self,
        recipe: Recipe,
        blocks: Blocks,
        calls: list[BlockCall],
        hidden: Tensor,
        device: torch.device,
        gradients: list[dict[str, Tensor]] | None = None,
    ) -> None:
        self.gradients = gradients
        self.asymmetry, self.sequential = recipe.asymmetry, recipe.calibration.sequential
        self.relative = recipe.calibration.tokens == "relative"
        self.first_token = recipe.calibration.first_token
        self.blocks, self.calls, self.device = blocks, calls, device
        self.hidden = hidden
        self.refit = recipe.refit if recipe.refit.steps else None
        follows = self.refit is not None and self.refit.towards == "original"
        compares = self.asymmetry.strength or follows or recipe.refit.model_steps
        self.originals = hidden.clone() if compares else None

    def passes(self, linears: dict[str, nn.Module]) -> int:
        """How often a block is run on every window to calibrate it, judged by the first."""
        groups = len(self._wiring(0, linears).groups) if self.sequential else 1
        alone = self.refit is not None and self.refit.towards == "block"
        beside = groups if self.asymmetry.strength else 1
        return groups + beside * (self.originals is not None) + alone

    def rounds(
        self, i: int, linears: dict[str, nn.Module], advance: Advance = None
    ) -> Iterator[Statistics]:
        """Yield statistics of some linears of block `i`, then of the next, in the order of calls.

        The linears of one round are to be replaced in the block before the next one is asked for.
        What the original block puts out is taken on the way.

        Args:
            i: index of the block; its linears are the original ones.
            linears: those to be compressed, by name.
            advance: called with 1 after every window and pass.
        """
        weighted = self.relative or self.first_token != 1 or self.gradients is not None
        if not (self.sequential or weighted) and self.originals is None:
            yield capture_inputs(
                self.blocks.modules[i],
                self.hidden,
                self.calls[i],
                linears,
                lambda features: GramAccumulator(features, self.device),
                device=self.device,
                advance=advance,
            )
            return
        found = self._wiring(i, linears)
        groups = (list(found.groups) if self.sequential else [sum(found.groups, ())]) or [()]
        original = None if self.originals is None else copy.deepcopy(self.blocks.modules[i])
        for number, names in enumerate(groups, 1):
            pairs, last = self._pairs(names, found), number == len(groups)
            looks = self._look_at_originals(i, original, pairs, found, last, advance)
            yield self._look(i, names, pairs, found, looks, advance)

    def target(self, W: Tensor, statistics: GramAccumulator) -> Tensor:
        """What to compress a weight `(rows, cols)` float32 towards."""
        if not isinstance(statistics, PairAccumulator):
            return W
        spec = self.asymmetry
        return shifted_target(W, statistics, spec.strength, spec.percdamp)

    def block_output(self, i: int, advance: Advance = None) -> Tensor | None:
        """What block `i`, not compressed yet, puts out on the compressed model's hidden states.

        None unless refitting wants it.
        """
        if self.refit is None or self.refit.towards == "original":
            return None
        return self._run(i, self.hidden, torch.empty_like(self.hidden), advance)

    def propagate(self, i: int, advance: Advance = None) -> None:
        """Run the compressed block `i` on the compressed model's hidden states."""
        self._run(i, self.hidden, self.hidden, advance)

    def propagate_original(self, i: int) -> None:
        """Run block `i`, not compressed yet, on the original model's, where somebody compares."""
        if self.originals is not None:
            self._run(i, self.originals, self.originals, None)

    def release(self) -> Tensor:
        """Hand over `originals` and let go of `hidden`: nothing is calibrated any more."""
        originals, self.originals = self.originals, None
        self.hidden = torch.empty(0)
        return originals

    def _run(self, i: int, hidden: Tensor, out: Tensor, advance: Advance) -> Tensor:
        block, call = self.blocks.modules[i], self.calls[i]
        return run_block(block, hidden, call, out=out, device=self.device, advance=advance)

    def _wiring(self, i: int, linears: dict[str, nn.Module]) -> Wiring:
        """How a block hangs together: groups of the linears that are compressed, all writers."""
        block, call = self.blocks.modules[i], self.calls[i]
        found = wiring(block, self.hidden[:1], call, find_linears(block), self.device)
        seen = set().union(*found.groups)
        check_all_ran([name for name in linears if name not in seen], call.name)
        self._check_writers(linears, found, call.name)
        groups = (tuple(name for name in group if name in linears) for group in found.groups)
        return Wiring(tuple(group for group in groups if group), found.writers)

    def _check_writers(self, linears: dict[str, nn.Module], found: Wiring, block: str) -> None:
        moves = self.asymmetry.strength and self.asymmetry.linears == "writers"
        if linears and not found.writers and (moves or self.relative):
            what = "asymmetry.linears=writers" if moves else "calibration.tokens=relative"
            raise RecipeError(
                f"{what} is about linears whose outputs are added to the hidden states, and "
                f"{block} has none: it normalises or scales what it adds; use "
                f"{'asymmetry.linears=all' if moves else 'calibration.tokens=equal'}"
            )

    def _pairs(self, names: tuple[str, ...], found: Wiring) -> tuple[str, ...]:
        """Of some linears those whose targets move; of each input the first stands for all."""
        if not self.asymmetry.strength:
            return ()
        leaders = tuple(group[0] for group in found.groups if group[0] in names)
        if self.asymmetry.linears == "all":
            return leaders
        return tuple(name for name in leaders if name in found.writers)

    def _look_at_originals(
        self,
        i: int,
        original: nn.Module | None,
        pairs: tuple[str, ...],
        found: Wiring,
        last: bool,
        advance: Advance,
    ) -> Iterator[Look | None]:
        """What some linears see in the original model, window by window.

        Nothing is kept for all windows at once: the original block is run anew for every round, in
        the last one to its end, and then its hidden states take the place of those that enter it.
        """
        if original is None or not (pairs or last):
            yield from repeat(None, len(self.hidden))
            return
        looks = look_at_windows(
            original,
            self.originals,
            self.calls[i],
            pairs,
            found.writers,
            whole=last,
            device=self.device,
            advance=advance,
        )
        for n, look in enumerate(looks):
            if last:
                self.originals[n] = look.out[0]
            yield look

    def _look(
        self,
        i: int,
        names: tuple[str, ...],
        pairs: tuple[str, ...],
        found: Wiring,
        originals: Iterator[Look | None],
        advance: Advance,
    ) -> Statistics:
        """Statistics of some linears on the compressed model's hidden states."""
        groups = [group for group in found.groups if group[0] in names]
        leaders = [group[0] for group in groups]
        matters = {group[0]: self._matters(i, group) for group in groups}
        statistics: Statistics = {}
        looks = look_at_windows(
            self.blocks.modules[i],
            self.hidden,
            self.calls[i],
            leaders,
            found.writers,
            device=self.device,
            advance=advance,
        )
        for n, (look, original) in enumerate(zip(looks, originals, strict=True)):
            for name in leaders:
                x = look.inputs[name]
                if name not in statistics:
                    make = PairAccumulator if name in pairs else GramAccumulator
                    statistics[name] = make(x.shape[-1], self.device)
                weight = self._weight(x, look.before.get(name), matters[name], n)
                if name in pairs:
                    gap = self._gap(name, look, original, found)
                    statistics[name].add_pair(x, original.inputs[name], gap, weight)
                else:
                    statistics[name].add(x, weight)
        return {name: statistics[group[0]] for group in groups for name in group}

    def _gap(self, name: str, look: Look, original: Look, found: Wiring) -> Tensor | None:
        """What the hidden states that a writer adds to have lost, float32 `(tokens, width)`.

        Unless linears see what those before them make up for, the first writer alone is to do it.
        """
        makes_up = found.writers if self.sequential else found.writers[:1]
        if not self.asymmetry.residual or name not in makes_up:
            return None
        stream = look.before[name].float()
        gap = original.before[name].to(look.before[name]).float() - stream
        if self.asymmetry.residual == "relative":
            gap *= _no_larger_than_most(stream)[:, None]
        return gap

    def _matters(self, i: int, group: tuple[str, ...]) -> Tensor | None:
        """By the gradients of linears that share an input, what each token counts, mean 1."""
        if self.gradients is None:
            return None
        total = torch.stack([self.gradients[i][name] for name in group]).sum(0)
        return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)

    def _weight(
        self, x: Tensor, stream: Tensor | None, matters: Tensor | None, n: int
    ) -> Tensor | None:
        """What each token of window n counts, float32 `(tokens,)`; None = all the same."""
        relative = self.relative and stream is not None
        if self.first_token == 1 and not relative and matters is None:
            return None
        weight = torch.ones(len(x), device=x.device)
        if matters is not None:
            weight = matters[n].to(x.device, copy=True)
        elif relative:
            weight = _relative(stream)
        weight[0] *= self.first_token
        return weight


def _no_larger_than_most(hidden: Tensor) -> Tensor:
    """Median over every token's mean square, at most 1, of float32 `(tokens, width)`."""
    square = hidden.square().mean(-1)
    return (square.median() / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_max(1)


def _relative(hidden: Tensor) -> Tensor:
    """1 / mean square of every token's hidden states `(tokens, width)`, float32 `(tokens,)`."""
    square = hidden.float().square().mean(-1)
    least = 0.1 * square.median() + torch.finfo(torch.float32).tiny  # a token of zeros counts too
    return 1 / torch.maximum(square, least)
