"""Tune all compressed blocks together towards what the original model predicts.

The last stage of a run (`refit.model_steps` in a recipe): Adam on the KL divergence of the next
token's distribution from the original model's, over the calibration windows.
"""

import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subbit.model import BlockCall, Blocks, ModelEnd, backward
from subbit.model.capture import placed
from subbit.packed.linear import dense_cache
from subbit.recipe import RefitSpec
from subbit.refit.adam import Adam, power_of_two
from subbit.refit.tuned import JUDGED, Learner, Refit, tune

__all__ = ["STEP", "Shelf", "refit_model"]

Advance = Callable[[int], None] | None

STEP = 4  # runs of a window through every block that a step counts for: there and back

_KEPT = "refit-steps"
_KEPT_EVERY = 120.0  # seconds


class Shelf(Protocol):
    """Keeps where the work stands for a run that goes on later, as a `Workdir` does."""

    def fetch_tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return what is kept under `name`, or None."""

    def store_tensors(self, name: str, tensors: dict[str, Tensor], value: Any) -> None:
        """Keep tensors and a JSON-able value under `name`, in the place of those before."""


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
    frozen: Sequence[Container[str]] | None = None,
    device: torch.device,
    shelf: Shelf | None = None,
    advance: Advance = None,
    skip: Advance = None,
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
        frozen: for every block the names of parameters that do not learn; None = none.
        device: where the blocks run.
        shelf: every two minutes the steps so far are kept there; with the same other arguments the
            work goes on after them, to the same result.
        advance: called with 1 for every block and window that was run, thrice for the way back.
        skip: called with what need not be run again.
    """
    by_factor = spec.model_levels == "factor"
    frozen = [()] * len(linears) if frozen is None else frozen
    learners = [
        Learner(block, *names, by_factor)
        for block, *names in zip(blocks.modules, linears, frozen, strict=True)
    ]
    end = ModelEnd(model, blocks)
    job = _Job(
        learners, hidden, target, calls, end, device, spec.model_rate, order, shelf, advance, skip
    )
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
        shelf: Shelf | None = None,
        advance: Advance = None,
        skip: Advance = None,
    ) -> None:
        self.learners, self.hidden, self.target = learners, hidden, target
        self.calls, self.end, self.device = calls, end, device
        self.steps, self.rate, self.order = len(order), rate, order
        self.shelf = shelf
        self.advance, self.skip = (call or (lambda steps: None) for call in (advance, skip))

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
        """A window a step."""
        learning = [p for learner in self.learners for p in learner.begin()]
        if not learning:
            return
        optimizer = Adam(learning, self.rate, self.steps, self._scale)
        self._take_up(optimizer)
        kept = time.monotonic()
        for window in self.order[optimizer.done :]:
            self._differentiate(window)
            optimizer.step()
            if self.shelf is not None and time.monotonic() - kept >= _KEPT_EVERY:
                self.shelf.store_tensors(_KEPT, optimizer.state(), optimizer.done)
                kept = time.monotonic()

    def _take_up(self, optimizer: Adam) -> None:
        """Go on after the steps of an interrupted run."""
        found = None if self.shelf is None else self.shelf.fetch_tensors(_KEPT)
        if found is not None:
            optimizer.take_up(*found)
            self.skip(STEP * len(self.learners) * optimizer.done)

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
                (self._scale * self._divergence(leaf[0], n, part)).backward()
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
    def _scale(self) -> float:
        return power_of_two(self.hidden.shape[1])

    @property
    def _parts(self) -> list[slice]:
        return list(self.end.parts(self.hidden.shape[1]))
