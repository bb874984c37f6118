"""What comes after the last block: the model's own last norm and head, whatever they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from subbit.model.blocks import Blocks
from subbit.model.calls import split_call

__all__ = ["ModelEnd", "positions_at_once"]

_LOGITS_AT_ONCE = 1 << 25  # 128 MiB in float32; a loss needs about three times as much


def positions_at_once(vocabulary: int) -> int:
    """How many positions' logits to have at once, so that they take little memory."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


class ModelEnd:
    """Logits from hidden states, by the model's own forward pass with its blocks left out.

    No family is named: each block hands on what it is given, the last one the hidden states in
    question, so that scaled or capped logits are what the model makes of them.

    Args:
        model: the causal LM.
        blocks: its decoder blocks.
    """

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        self._wrap = self._look()

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return self.model.get_output_embeddings().weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(tokens, V)` of hidden states `(tokens, width)` that leave the last block.

        They depend on one position at a time, so any tokens will do; gradients pass.
        """
        with self._without_blocks(hidden[None]):
            return self._run(len(hidden))

    def parts(self, count: int) -> Iterator[slice]:
        """A number of positions, so many at once that their logits take little memory."""
        step = positions_at_once(self.vocabulary)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Have everything outside the blocks on a device for a while."""
        inside = {module for block in self.blocks.modules for module in block.modules()}
        outside = [module for module in self.model.modules() if module not in inside]
        home = next(chain(self.model.parameters(), self.model.buffers())).device

        def move(place: torch.device) -> None:
            for module in outside:
                module._apply(lambda tensor: tensor.to(place), recurse=False)

        move(device)
        try:
            yield
        finally:
            move(home)

    def _run(self, tokens: int) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
        return self.model(input_ids=ids, use_cache=False).logits[0]

    @torch.no_grad()
    def _look(self) -> Callable[[Tensor], Any]:
        """How a block wraps the hidden states that it puts out."""
        seen: list[Any] = []
        last = self.blocks.modules[-1]
        handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self._run(1)
        finally:
            handle.remove()
        output = seen[0]
        if isinstance(output, Tensor):
            return lambda hidden: hidden
        return lambda hidden: type(output)((hidden, *output[1:]))

    @contextmanager
    def _without_blocks(self, leaving: Tensor) -> Iterator[None]:
        """Let every block hand on what it is given, and the last one `leaving`."""

        def stub(index: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                is_last = index + 1 == len(self.blocks.modules)
                given = leaving if is_last else split_call(self.blocks.name(index), args, kwargs)[0]
                return self._wrap(given)

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks.modules):
                stack.callback(_restore, block, block.__dict__.get("forward"))
                block.forward = stub(index)
            yield


def _restore(block: nn.Module, own: Callable | None) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own
