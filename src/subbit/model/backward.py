"""Gradients through the decoder blocks, one block's graph at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from subbit.linalg import GramAccumulator
from subbit.model.blocks import Blocks, weight_of
from subbit.model.calls import BlockCall
from subbit.model.capture import placed
from subbit.model.end import ModelEnd

__all__ = ["OutputGrams", "TokenGradients", "backward", "look_at_gradients"]

Advance = Callable[[int], None] | None
Linears = Sequence[dict[str, nn.Module]]

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


class TokenGradients:
    """How much the text's likelihood feels what each linear puts out at each token.

    Attributes:
        found: for every block and linear the square of the gradient of a window's negative
            log-likelihood in the linear's output, summed over its outputs, float32 `(nsamples,
            seqlen)`.
    """

    def __init__(self, linears: Linears, tokens: Tensor) -> None:
        self.found = [{name: torch.zeros(tokens.shape) for name in own} for own in linears]

    def __call__(self, i: int, name: str, n: int, gradient: Tensor) -> None:
        """Take the gradient `(seqlen, outputs)` of window n in a linear of block i."""
        self.found[i][name][n] = gradient.square().sum(-1)


class OutputGrams:
    """In which directions of its output the text's likelihood feels each linear.

    Attributes:
        found: for every block and linear `sum g^T g` over all tokens, `(outputs, outputs)` on the
            CPU: g is the gradient of a window's negative log-likelihood in the linear's output at a
            token, cut to twice the root mean square that the median token of the window has.
            Without that a window's first token, on which attention rests, can be nine tenths of
            the sum for values, and most of it for keys.
    """

    def __init__(self, linears: Linears) -> None:
        self.found = [
            {name: GramAccumulator(weight_of(linear).shape[0]) for name, linear in own.items()}
            for own in linears
        ]

    def __call__(self, i: int, name: str, n: int, gradient: Tensor) -> None:
        """Take the gradient `(tokens, outputs)` of window n in a linear of block i."""
        size = gradient.square().sum(-1)
        felt = size[size > 0]
        if felt.numel():
            self.found[i][name].add(gradient, (_LOUDEST * felt.median() / size).clamp_max(1.0))


def look_at_gradients(
    model: nn.Module,
    blocks: Blocks,
    linears: Linears,
    hidden: Tensor,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    takers: Sequence[Callable[[int, str, int, Tensor], None]],
    *,
    device: torch.device,
    advance: Advance = None,
) -> None:
    """Run every window there and back, and show the gradients in what the linears put out.

    Args:
        model: the causal LM, not compressed yet.
        blocks: its decoder blocks.
        linears: of every block those to look at, by name.
        hidden: hidden states `(nsamples, seqlen, width)` that enter the first block.
        calls: the other arguments of every block.
        tokens: token ids `(nsamples, seqlen)`.
        takers: each is given block, linear, window and the gradient of the window's negative
            log-likelihood in the linear's output, float32 `(tokens, outputs)` on the CPU.
        device: where the blocks run.
        advance: as in `backward`.
    """
    end = ModelEnd(model, blocks)
    with ExitStack() as stack:
        stack.enter_context(end.on(device))
        window = _Window(end, device)
        for i, own in enumerate(linears):
            for name, linear in own.items():
                handle = linear.register_forward_hook(window.hook(takers, i, name))
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

    def hook(self, takers: Sequence[Callable], i: int, name: str) -> Callable:
        """A forward hook that has the gradient of the output taken."""

        def write(gradient: Tensor) -> None:
            gradient = gradient.detach().float().flatten(0, -2).cpu()
            for take in takers:
                take(i, name, self.n, gradient)

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
