"""Run one decoder block over all calibration windows, and see what its linears see."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbit.errors import ModelError, NonFiniteError
from subbit.model.blocks import Blocks
from subbit.model.calls import BlockCall, hidden_of

__all__ = [
    "Accumulator",
    "block_similarities",
    "capture_inputs",
    "check_all_ran",
    "in_float32",
    "placed",
    "run_block",
]

Advance = Callable[[int], None] | None


class Accumulator(Protocol):
    """What gathers the statistics of one input: see `subbit.linalg`."""

    tokens: int

    def add(self, x: Tensor) -> None:
        """Take in `x` `(tokens, features)`."""


A = TypeVar("A", bound=Accumulator)


def run_block(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    *,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
    advance: Advance = None,
) -> Tensor:
    """Run one block on every window.

    Args:
        block: the decoder block; it is back on its own device afterwards.
        hidden: hidden states `(nsamples, seqlen, width)` entering it, on the CPU.
        call: its other arguments.
        out: where the result goes; `hidden` itself halves the memory. A new tensor if None.
        device: where the block runs; None = where it is.
        advance: called with 1 after every window.

    Returns:
        The hidden states leaving the block, shape and dtype of `hidden`.

    Raises:
        NonFiniteError: NaN or Inf come out; names the block, the window and the first linear
            in which they appear.
    """
    out = torch.empty_like(hidden) if out is None else out

    def visit(i: int, x: Tensor, y: Tensor) -> None:
        _check_output(block, x, y, call, i)
        out[i] = y[0]

    _run_windows(block, hidden, call, device, advance, visit)
    return out


def capture_inputs(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    linears: dict[str, nn.Module],
    make_accumulator: Callable[[int], A],
    *,
    device: torch.device | str | None = None,
    advance: Advance = None,
) -> dict[str, A]:
    """Run one block on every window and gather statistics of what its linears are given.

    Linears that are given the very same tensor (query, key and value; gate and up) share one
    accumulator object.

    Args:
        block: the decoder block; its outputs are thrown away.
        hidden: hidden states `(nsamples, seqlen, width)` entering it, on the CPU.
        call: its other arguments.
        linears: linears in the block by name, as `find_linears` gives them.
        make_accumulator: number of input features -> accumulator; its `add` gets
            `(tokens, features)` in the model's dtype on the device of the block.
        device: where the block runs; None = where it is.
        advance: called with 1 after every window.

    Returns:
        Linear name -> accumulator.

    Raises:
        ModelError: a linear is never called.
        NonFiniteError: a linear is given NaN or Inf.
    """
    watch = _Watch(call.name, make_accumulator)
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(watch.hook(name)).remove)
        _run_windows(block, hidden, call, device, advance, lambda i, x, y: watch.end_window())
    check_all_ran([name for name in linears if name not in watch.leader], call.name)
    return {name: watch.accumulators[watch.leader[name]] for name in linears}


def check_all_ran(never: list[str], block: str) -> None:
    """Refuse linears of a block that never ran.

    Raises:
        ModelError: there are any.
    """
    if never:
        raise ModelError(
            f"{', '.join(never)} of {block} never ran on the calibration text, so there is "
            "nothing to calibrate on; skip such linears by name or give more text"
        )


def block_similarities(
    blocks: Blocks,
    calls: list[BlockCall],
    hidden: Tensor,
    *,
    device: torch.device | str | None = None,
    advance: Advance = None,
) -> list[float]:
    """Return how little each block changes its input (the coarse stage of PBS2P).

    Args:
        blocks: the decoder blocks of the original model.
        calls: how they are called, from `record_calls`.
        hidden: hidden states `(nsamples, seqlen, width)` entering the first block, unchanged.
        device: where the blocks run; None = where they are.
        advance: called with 1 after every window of every block.

    Returns:
        For every block the mean over all tokens of cos(hidden states in, hidden states out).

    Raises:
        NonFiniteError: a block puts out NaN or Inf.
    """
    scratch = hidden.clone()
    similarities = []
    for block, call in zip(blocks.modules, calls, strict=True):
        similarities.append(_similarity(block, call, scratch, device, advance))
    return similarities


class _Watch(Generic[A]):
    """Feeds accumulators from pre-hooks; linears given the same tensor follow one leader."""

    def __init__(self, block: str, make_accumulator: Callable[[int], A]) -> None:
        self.leader: dict[str, str] = {}  # linear -> the linear whose accumulator it shares
        self.accumulators: dict[str, A] = {}  # leader -> accumulator
        self._given: dict[str, tuple[Tensor, int]] = {}  # leader -> input in this window, version
        self._block = block
        self._make = make_accumulator

    def hook(self, name: str) -> Callable:
        return lambda module, args: self._see(name, args[0])

    def end_window(self) -> None:
        self._given.clear()

    def _see(self, name: str, x: Tensor) -> None:
        if name not in self.leader:
            self.leader[name] = next((n for n in self._given if self._is_given(n, x)), name)
        leader = self.leader[name]
        if leader != name:
            if not self._is_given(leader, x):
                raise ModelError(
                    f"{name} of {self._block} shares its input with {leader} in some windows only; "
                    "such models are not supported"
                )
            return
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"{name} of {self._block} is given NaN or Inf: the activations overflow "
                f"{x.dtype}, or a block before it was compressed badly; try --dtype float32"
            )
        if name not in self.accumulators:
            self.accumulators[name] = self._make(x.shape[-1])
        self._given[name] = (x, x._version)
        self.accumulators[name].add(x.reshape(-1, x.shape[-1]))

    def _is_given(self, leader: str, x: Tensor) -> bool:
        # the version counter tells a tensor that was changed in place in between
        given, version = self._given.get(leader, (None, 0))
        return given is x and x._version == version


def _similarity(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    device: torch.device | str | None,
    advance: Advance,
) -> float:
    """Run the block in place on `hidden`; return the mean cosine between in and out."""
    sums: list[float] = []

    def visit(i: int, x: Tensor, y: Tensor) -> None:
        _check_output(block, x, y, call, i)
        cosine = F.cosine_similarity(x.float(), y.float(), dim=-1)  # (1, seqlen)
        sums.append(cosine.double().sum().item())
        hidden[i] = y[0]

    _run_windows(block, hidden, call, device, advance, visit)
    return sum(sums) / hidden[..., 0].numel()


@torch.no_grad()
def _run_windows(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    device: torch.device | str | None,
    advance: Advance,
    visit: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run the block on every window; `visit(i, in, out)` sees tensors `(1, seqlen, width)`."""
    with placed(block, device) as place:
        call = call.to(place)
        for i in range(len(hidden)):
            x = hidden[i : i + 1].to(place, copy=True)  # a block may work in place
            visit(i, x, call.run(block, x))
            if advance:
                advance(1)


@contextmanager
def placed(block: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Move a block to `device`, None = leave it where it is, and back afterwards; yields where."""
    tensors = chain(block.parameters(), block.buffers())
    home = next((tensor.device for tensor in tensors), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    block.to(place)
    try:
        yield place
    finally:
        block.to(home)


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Let a block compute in float32; afterwards it is bit for bit what it was."""
    dtypes = [(parameter, parameter.dtype) for parameter in block.parameters()]
    buffers = [(module, dict(module._buffers)) for module in block.modules()]
    block.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
        for module, own in buffers:
            module._buffers.update(own)


def _check_output(block: nn.Module, x: Tensor, y: Tensor, call: BlockCall, window: int) -> None:
    """Raise if `y` is not finite, naming the first module that turned `x` into NaN or Inf."""
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ModelError(
            f"{call.name} turns hidden states {tuple(x.shape)} {x.dtype} into {tuple(y.shape)} "
            f"{y.dtype}; blocks that change shape or dtype are not supported"
        )
    if torch.isfinite(y).all():
        return
    culprits: list[str] = []

    def look(name: str, output: object) -> None:
        output = hidden_of(output)
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            culprits.append(f"{call.name}.{name}")

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name and not any(module.children()):
                handle = module.register_forward_hook(lambda m, a, out, n=name: look(n, out))
                hooks.callback(handle.remove)
        call.to(x.device).run(block, x)
    where = culprits[0] if culprits else call.name
    raise NonFiniteError(
        f"{where} puts out NaN or Inf on calibration window {window}: the activations overflow "
        f"{x.dtype}, or a linear was compressed badly; try --dtype float32"
    )
