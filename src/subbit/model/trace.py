"""Record from the model's own forward pass what enters its blocks."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from subbit.errors import CalibrationError, ModelError, NonFiniteError
from subbit.model.blocks import Blocks
from subbit.model.calls import BlockCall, check_same_call, hidden_of, same_tensor, split_call

__all__ = ["first_inputs", "record_calls"]


def record_calls(model: nn.Module, blocks: Blocks, windows: LongTensor) -> list[BlockCall]:
    """Record what every block is called with beside the hidden states.

    Runs the model without its head on two windows. The second shows whether those arguments
    depend on the text, in which case blocks cannot be run one by one from hidden states alone.

    Args:
        model: the causal LM.
        blocks: its decoder blocks.
        windows: token ids `(nsamples, seqlen)`; the first two rows are used.

    Returns:
        One `BlockCall` a block, in order.

    Raises:
        ModelError: a block is not called exactly once and in order, does not get the hidden
            states that the one before gave, or takes arguments that depend on the text.
    """
    _check_windows(windows)
    first, second = windows[:1], windows[1:2]
    if not len(second) or torch.equal(first, second):
        second = first.flip(1)
    calls = _trace(model, blocks, first)
    for call, other in zip(calls, _trace(model, blocks, second)):
        check_same_call(call, other)
    return calls


def first_inputs(
    model: nn.Module,
    blocks: Blocks,
    windows: LongTensor,
    *,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Return the hidden states that enter the first block, on the CPU.

    Args:
        model: the causal LM; only what comes before its first block is run.
        blocks: its decoder blocks.
        windows: token ids `(nsamples, seqlen)`.
        advance: called with 1 after every window.

    Returns:
        `(nsamples, seqlen, width)` in the dtype of the model.

    Raises:
        ModelError: the first block is not reached.
        NonFiniteError: the hidden states of a window contain NaN or Inf.
    """
    _check_windows(windows)
    collected: Tensor | None = None
    for i in range(len(windows)):
        hidden = _enter(model, blocks, windows[i : i + 1])
        if not torch.isfinite(hidden).all():
            raise NonFiniteError(
                f"the embedding of calibration window {i} has NaN or Inf before {blocks.name(0)}: "
                "check the model, or load it in float32"
            )
        if collected is None:
            shape = (len(windows), *hidden.shape[1:])
            collected = torch.empty(shape, dtype=hidden.dtype, device="cpu")
        collected[i] = hidden[0]
        if advance:
            advance(1)
    return collected


class _Reached(Exception):
    """The first block was reached; carries the hidden states it was called with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _check_windows(windows: LongTensor) -> None:
    if windows.ndim != 2 or not windows.numel():
        raise CalibrationError(
            f"calibration windows must be token ids of shape (nsamples, seqlen), at least one, "
            f"got {tuple(windows.shape)}"
        )


def _enter(model: nn.Module, blocks: Blocks, window: LongTensor) -> Tensor:
    """Return the hidden states `(1, seqlen, width)` entering block 0, and run nothing after."""

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached(split_call(blocks.name(0), args, kwargs)[0])

    handle = blocks.modules[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _run_body(model, window)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__} never calls its block {blocks.name(0)}")


@torch.no_grad()
def _run_body(model: nn.Module, window: LongTensor) -> None:
    """Run the model on one window `(1, seqlen)` without cache and without its head."""
    body = getattr(model, "base_model", model)
    body(input_ids=window.to(next(model.parameters()).device), use_cache=False)


def _trace(model: nn.Module, blocks: Blocks, window: LongTensor) -> list[BlockCall]:
    """Run one window and return every block's call, checking that the blocks form a chain."""
    calls: list[BlockCall] = []
    previous: list[Tensor] = []  # what the block before gave

    def before(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden, call = split_call(blocks.name(index), args, kwargs)
            _check_link(blocks, index, len(calls), hidden, previous, tuple(window.shape))
            calls.append(call)

        return hook

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        previous[:] = [hidden_of(output)]

    with ExitStack() as hooks:
        for index, block in enumerate(blocks.modules):
            handle = block.register_forward_pre_hook(before(index), with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(block.register_forward_hook(after).remove)
        _run_body(model, window)
    if len(calls) != len(blocks.modules):
        raise ModelError(
            f"{blocks.name(len(calls))} is never called in a forward pass, though {blocks.path} "
            f"has {len(blocks.modules)} blocks"
        )
    return calls


def _check_link(
    blocks: Blocks,
    index: int,
    expected: int,
    hidden: Tensor,
    previous: list[Tensor],
    window_shape: tuple[int, ...],
) -> None:
    name = blocks.name(index)
    if index != expected:
        raise ModelError(
            f"{name} is called out of order or more than once in a forward pass; subbit needs "
            "blocks that run one after the other, each once"
        )
    if hidden.ndim != 3 or hidden.shape[:2] != window_shape:
        raise ModelError(
            f"{name} takes hidden states of shape {tuple(hidden.shape)} instead of "
            f"{window_shape} + (width,); such models are not supported"
        )
    if previous and not same_tensor(hidden, previous[0]):
        raise ModelError(
            f"{name} does not get the hidden states that {blocks.name(index - 1)} gave: something "
            "happens between the blocks, so they cannot be run one by one"
        )
