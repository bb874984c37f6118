"""Tune one compressed block towards what the original one puts out.

Block-wise reconstruction after the codes are settled (`refit.steps` in a recipe): Adam on the
distance between what the compressed block puts out and what the original one did.
"""

from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from subbit.model import BlockCall
from subbit.model.capture import placed
from subbit.packed.linear import dense_cache
from subbit.recipe import RefitSpec
from subbit.refit.adam import Adam, power_of_two
from subbit.refit.tuned import JUDGED, Learner, Refit, tune

__all__ = ["refit_block"]

Advance = Callable[[int], None] | None


def refit_block(
    block: nn.Module,
    linears: list[str],
    hidden: Tensor,
    target: Tensor,
    call: BlockCall,
    spec: RefitSpec,
    *,
    frozen: Container[str] = (),
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
        frozen: names of parameters that do not learn.
        device: where the work is done.
        advance: called with 1 after every step.
    """
    with placed(block, device) as place:
        learner = Learner(block, linears, frozen)
        return tune(_Job(learner, hidden, target, call.to(place), place, spec, advance))


class _Job:
    """A block, what enters it and what is to leave it."""

    def __init__(
        self,
        learner: Learner,
        hidden: Tensor,
        target: Tensor,
        call: BlockCall,
        place: torch.device,
        spec: RefitSpec,
        advance: Advance,
    ) -> None:
        self.learner, self.hidden, self.target = learner, hidden, target
        self.call, self.place = call, place
        self.steps, self.rate, self.advance = spec.steps, spec.rate, advance
        self.settle, self.restore = learner.settle, learner.restore

    @torch.no_grad()
    def error(self) -> float:
        """Mean relative error over the first windows, of the block as it stands."""
        count = min(len(self.hidden), JUDGED)
        block = self.learner.block
        with dense_cache(block):
            return sum(float(self._distance(n, block)) for n in range(count)) / count

    def descend(self) -> None:
        """A window a step."""
        learning = self.learner.begin()
        if not learning:
            return
        scale = power_of_two(self.target[0].numel())
        optimizer = Adam(learning, self.rate, self.steps, scale)
        with torch.enable_grad():
            for step in range(self.steps):
                loss = self._distance(step % len(self.hidden), self.learner)
                (scale * loss).backward()
                optimizer.step()
                if self.advance:
                    self.advance(1)

    def _distance(self, n: int, block: Callable) -> Tensor:
        """Error of window n: mean over tokens of |out - target|^2 / |target|^2."""
        hidden = self.hidden[n : n + 1].to(self.place, copy=True)
        out = self.call.run(block, hidden)[0].float()
        target = self.target[n].to(self.place).float()
        size = target.square().sum(-1)
        least = 0.1 * size.median() + torch.finfo(torch.float32).tiny
        return ((out - target).square().sum(-1) / torch.maximum(size, least)).mean()
