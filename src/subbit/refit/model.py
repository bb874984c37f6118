"""Tune all compressed blocks together towards what the original model predicts.

The last stage of a run (`refit.model_steps` in a recipe): Adam on the KL divergence of the next
token's distribution from the original model's, over the calibration windows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from subbit.model import BlockCall, Blocks, ModelEnd, backward
from subbit.model.capture import placed
from subbit.packed.linear import dense_cache
from subbit.recipe import RefitSpec
from subbit.refit.tuned import JUDGED, Learner, Refit, adam, tune

__all__ = ["refit_model"]

Advance = Callable[[int], None] | None


def refit_model(
    model: nn.Module,
    blocks: Blocks,
    linears: list[list[str]],
    hidden: Tensor,
    target: Tensor,
    calls: list[BlockCall],
    spec: RefitSpec,
    order: Sequence[int],
    *,
    device: torch.device,
    advance: Advance = None,
) -> Refit:
    """Tune levels, norms and biases of all blocks in place, their packed linears made anew.

    What is outside the blocks (embeddings, last norm, head) stays as it is. Deterministic: nothing
    is drawn.

    Args:
        model: the causal LM, all its blocks compressed.
        blocks: its decoder blocks.
        linears: for every block the names of its `PackedLinear`s.
        hidden: hidden states `(nsamples, seqlen, width)` that enter the first block.
        target: those that leave the last block of the original model, same shape.
        calls: the other arguments of every block.
        spec: `model_rate` and `model_levels`.
        order: the window of every step of Adam. The first windows also judge the outcome.
        device: where the blocks run.
        advance: called with 1 for every block and window that was run, thrice for the way back.
    """
    by_factor = spec.model_levels == "factor"
    learners = [
        Learner(block, names, by_factor)
        for block, names in zip(blocks.modules, linears, strict=True)
    ]
    end = ModelEnd(model, blocks)
    job = _Job(learners, hidden, target, calls, end, device, spec.model_rate, order, advance)
    with end.on(device):
        return tune(job)


class _Job:
    """All blocks, what enters the first of them and what is to leave the last."""

    def __init__(
        self,
        learners: list[Learner],
        hidden: Tensor,
        target: Tensor,
        calls: list[BlockCall],
        end: ModelEnd,
        device: torch.device,
        rate: float,
        order: Sequence[int],
        advance: Advance,
    ) -> None:
        self.learners, self.hidden, self.target = learners, hidden, target
        self.calls, self.end, self.device = calls, end, device
        self.steps, self.rate, self.order = len(order), rate, order
        self.advance = advance or (lambda steps: None)

    @torch.no_grad()
    def error(self) -> float:
        """Mean divergence over the first windows, of the blocks as they stand."""
        count = min(len(self.hidden), JUDGED)
        hidden = self.hidden[:count].clone()
        for learner, call in zip(self.learners, self.calls, strict=True):
            with placed(learner.block, self.device) as place, dense_cache(learner.block):
                here = call.to(place)
                for n in range(count):
                    x = hidden[n : n + 1].to(place, copy=True)
                    hidden[n] = here.run(learner.block, x)[0]
                    self.advance(1)
        windows = ((n, part) for n in range(count) for part in self._parts)
        return sum(float(self._divergence(hidden[n], n, part)) for n, part in windows) / count

    def descend(self) -> None:
        """Adam with a cosine schedule, a window a step."""
        learning = [p for learner in self.learners for p in learner.begin()]
        optimizer, schedule = adam(learning, self.rate, self.steps)
        for window in self.order:
            optimizer.zero_grad()
            self._differentiate(window)
            optimizer.step()
            schedule.step()

    def settle(self) -> bool:
        """Put what was learned in place as it is stored; False if some of it cannot be."""
        return all([learner.settle() for learner in self.learners])

    def restore(self) -> None:
        """Put every block back as it was."""
        for learner in self.learners:
            learner.restore()

    def _differentiate(self, n: int) -> None:
        """Leave the gradients of window n in the parameters that learn."""
        backward(
            self.learners,
            [learner.block for learner in self.learners],
            self.calls,
            self.hidden[n : n + 1],
            lambda leaving: self._gradient(leaving, n),
            device=self.device,
            advance=self.advance,
        )

    def _gradient(self, leaving: Tensor, n: int) -> Tensor:
        """Gradient of window n's divergence in what leaves the last block `(1, seqlen, width)`."""
        leaf = leaving.detach().requires_grad_()
        with torch.enable_grad():
            for part in self._parts:
                self._divergence(leaf[0], n, part).backward()
        return leaf.grad

    def _divergence(self, leaving: Tensor, n: int, part: slice) -> Tensor:
        """What some tokens of window n add to its mean KL divergence."""
        target = self.target[n]
        with torch.no_grad():
            wanted = self.end.logits(target[part].to(self.device)).float().log_softmax(-1)
        given = self.end.logits(leaving[part].to(self.device)).float().log_softmax(-1)
        sums = nn.functional.kl_div(given, wanted, log_target=True, reduction="sum")
        return sums / len(target)

    @property
    def _parts(self) -> list[slice]:
        return list(self.end.parts(self.hidden.shape[1]))
