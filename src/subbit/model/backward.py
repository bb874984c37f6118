"""Gradients through the decoder blocks, one block's graph at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from subbit.linalg import GramAccumulator
from subbit.model.blocks import Blocks, weight_of
from subbit.model.calls import BlockCall
from subbit.model.capture import placed
from subbit.model.end import ModelEnd

__all__ = ["backward", "output_grams", "token_gradients"]

Advance = Callable[[int], None] | None

_LOUDEST = 4.0  # times the median token's squared gradient is what a token's counts as at most


def backward(
    runs: Sequence[Callable],
    modules: Sequence[nn.Module],
    calls: Sequence[BlockCall],
    hidden: Tensor,
    seed: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    learn: bool = True,
    advance: Advance = None,
) -> None:
    """Run all blocks on one window, and then back.

    A block is run forward without a graph and once more, with one, on the way back, so that no more
    than one block's graph is ever held and blocks can be on a GPU one at a time.

    Args:
        runs: how each block is run; the block itself or what calls it.
        modules: the blocks.
        calls: the other arguments of every block.
        hidden: hidden states `(1, seqlen, width)` that enter the first block.
        seed: hidden states that leave the last block -> the gradient in them.
        device: where the blocks run.
        learn: leave gradients in the parameters that require them; False = hooks on what the blocks
            compute are all that sees any.
        advance: called with 1 for every block on the way there, 3 on the way back.
    """
    advance = advance or (lambda steps: None)
    entering = [hidden]
    for run, module, call in zip(runs, modules, calls, strict=True):
        with placed(module, device) as place, torch.no_grad():
            out = call.to(place).run(run, entering[-1].to(place, copy=True))
        entering.append(out.to(hidden.device))
        advance(1)
    gradient = seed(entering.pop())
    for run, module, call in zip(reversed(runs), reversed(modules), reversed(calls), strict=True):
        with placed(module, device) as place, torch.enable_grad():
            x = entering.pop().to(place, copy=True).requires_grad_()
            out = call.to(place).run(run, x.clone())  # a block may work in place, unlike a leaf
            torch.autograd.backward(out, gradient.to(place), inputs=None if learn else [x])
        gradient = x.grad.to(hidden.device)
        advance(3)


def token_gradients(
    model: nn.Module,
    blocks: Blocks,
    linears: Sequence[dict[str, nn.Module]],
    hidden: Tensor,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    *,
    device: torch.device,
    advance: Advance = None,
) -> list[dict[str, Tensor]]:
    """How much the text's likelihood feels what each linear puts out at each token.

    Args:
        model: the causal LM, not compressed yet.
        blocks: its decoder blocks.
        linears: of every block, by name.
        hidden: hidden states `(nsamples, seqlen, width)` that enter the first block.
        calls: the other arguments of every block.
        tokens: token ids `(nsamples, seqlen)`.
        device: where the blocks run.
        advance: as in `backward`.

    Returns:
        For every block and linear the square of the gradient of a window's negative log-likelihood
        in the linear's output, summed over its outputs, float32 `(nsamples, seqlen)`.
    """
    found = [{name: torch.zeros(tokens.shape) for name in own} for own in linears]

    def note(i: int, name: str, n: int, gradient: Tensor) -> None:
        found[i][name][n] = gradient.square().sum(-1)

    _look_at_gradients(model, blocks, linears, hidden, calls, tokens, note, device, advance)
    return found


def output_grams(
    model: nn.Module,
    blocks: Blocks,
    linears: Sequence[dict[str, nn.Module]],
    hidden: Tensor,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    *,
    device: torch.device,
    advance: Advance = None,
) -> list[dict[str, GramAccumulator]]:
    """In which directions of its output the text's likelihood feels each linear.

    Args: as of `token_gradients`.

    Returns:
        For every block and linear `sum g^T g` over all tokens, `(outputs, outputs)` on the CPU: g
        is the gradient of a window's negative log-likelihood in the linear's output at a token, cut
        to twice the root mean square that the median token of the window has. Without that the
        first token, on which attention rests, is nine tenths of the sum for keys and values.
    """
    found = [
        {name: GramAccumulator(weight_of(linear).shape[0]) for name, linear in own.items()}
        for own in linears
    ]

    def add(i: int, name: str, n: int, gradient: Tensor) -> None:
        size = gradient.square().sum(-1)
        felt = size[size > 0]
        if felt.numel():
            found[i][name].add(gradient, (_LOUDEST * felt.median() / size).clamp_max(1.0))

    _look_at_gradients(model, blocks, linears, hidden, calls, tokens, add, device, advance)
    return found


def _look_at_gradients(
    model: nn.Module,
    blocks: Blocks,
    linears: Sequence[dict[str, nn.Module]],
    hidden: Tensor,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    note: Callable[[int, str, int, Tensor], None],
    device: torch.device,
    advance: Advance,
) -> None:
    """Run every window there and back; `note` gets block, linear, window and `(tokens, outputs)`.

    The gradients come to the CPU in float32.
    """
    end = ModelEnd(model, blocks)
    with ExitStack() as stack:
        stack.enter_context(end.on(device))
        window = _Window(end, device)
        for i, own in enumerate(linears):
            for name, linear in own.items():
                handle = linear.register_forward_hook(window.hook(partial(note, i, name)))
                stack.callback(handle.remove)
        for n, ids in enumerate(tokens):
            window.n, window.ids = n, ids
            backward(
                blocks.modules,
                blocks.modules,
                calls,
                hidden[n : n + 1],
                window.seed,
                device=device,
                learn=False,
                advance=advance,
            )


class _Window:
    """The window at hand."""

    def __init__(self, end: ModelEnd, device: torch.device) -> None:
        self.end, self.device = end, device
        self.n, self.ids = 0, torch.empty(0)

    def hook(self, note: Callable[[int, Tensor], None]) -> Callable:
        """A forward hook that has the gradient of the output noted."""

        def write(gradient: Tensor) -> None:
            note(self.n, gradient.detach().float().flatten(0, -2).cpu())

        def look(module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(write)

        return look

    def seed(self, leaving: Tensor) -> Tensor:
        """Gradient of the window's negative log-likelihood in what leaves the last block."""
        leaf, labels = leaving.detach().requires_grad_(), self.ids[1:].to(self.device)
        with torch.enable_grad():
            for part in self.end.parts(len(labels)):
                logits = self.end.logits(leaf[0][part].to(self.device)).float()
                nn.functional.cross_entropy(logits, labels[part], reduction="sum").backward()
        return leaf.grad
