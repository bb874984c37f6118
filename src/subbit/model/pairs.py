"""What the linears of a block see, run by run: in the original model and in the compressed one.

`capture_inputs` gathers one run over all windows for all linears. Here the windows are looked at
one by one, so that two runs can be compared token by token, and a run ends where nothing more is
wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from subbit.errors import NonFiniteError
from subbit.model.calls import BlockCall
from subbit.model.capture import placed

__all__ = ["Look", "Wiring", "look_at_windows", "wiring"]


@dataclass(frozen=True)
class Wiring:
    """How the linears of a block hang together.

    Attributes:
        groups: linears that are given the very same tensor, group by group in the order of calls.
        writers: linears whose outputs are what the block adds to its hidden states, in the order
            of calls (attention output and down projection, mostly); empty where that sum is not
            all there is to the block, as in models that normalise once more before they add.
    """

    groups: tuple[tuple[str, ...], ...]
    writers: tuple[str, ...]


@dataclass
class Look:
    """What one run of a block on one window shows.

    Attributes:
        inputs: linear -> `(tokens, features)`.
        before: writer -> `(tokens, width)`, the hidden states that its output will be added to.
        out: hidden states leaving the block `(1, seqlen, width)`; None if the run was cut short.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    out: Tensor | None = None


class _Enough(Exception):
    """All that was asked for has been seen."""


@torch.no_grad()
def wiring(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    linears: dict[str, nn.Module],
    device: torch.device | str | None = None,
) -> Wiring:
    """Find out how the linears of a block hang together by running it on one window.

    Args:
        block: the decoder block.
        hidden: `(1, seqlen, width)` entering it.
        call: its other arguments.
        linears: linears in the block by name.
        device: where the block runs; None = where it is.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # in the order of calls
    with placed(block, device) as place, ExitStack() as hooks:
        for name, linear in linears.items():

            def keep(module: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                seen.setdefault(name, (args[0], out))

            hooks.callback(linear.register_forward_hook(keep).remove)
        x = hidden.to(place, copy=True)
        y = call.to(place).run(block, x.clone())
    groups: list[list[str]] = []
    for name, (given, _) in seen.items():
        same = next((group for group in groups if seen[group[0]][0] is given), None)
        if same is None:
            groups.append([name])
        else:
            same.append(name)
    alone = [group[0] for group in groups if len(group) == 1]  # attention and MLP may flatten
    wide = [name for name in alone if seen[name][1].shape[-1] == x.shape[-1]]
    # all of them, or all but one: what an MLP is as wide inside as the hidden states are
    choices = [*combinations(wide, len(wide)), *combinations(wide, max(0, len(wide) - 1))]
    sums = (w for w in choices if _is_sum(y, [x, *(seen[name][1].view(x.shape) for name in w)]))
    return Wiring(tuple(map(tuple, groups)), next(sums, ()))


def _is_sum(y: Tensor, parts: list[Tensor]) -> bool:
    """Whether `y` is the sum of `parts`, but for the rounding of every addition to their dtype.

    Element by element: hidden states of one token may be a thousand times those of another.
    """
    y, *parts = (tensor.cpu() for tensor in (y, *parts))  # not every accelerator has float64
    total = sum(part.double() for part in parts)
    sizes = sum(part.abs().double() for part in parts)
    bound = len(parts) * torch.finfo(parts[0].dtype).eps * sizes
    return len(parts) > 1 and bool(((total - y.double()).abs() <= bound).all())


@torch.no_grad()
def look_at_windows(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    watched: Sequence[str],
    writers: Sequence[str],
    *,
    whole: bool = False,
    device: torch.device | str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Look]:
    """Run a block on every window and yield what the watched linears are given.

    Args:
        block: the decoder block.
        hidden: hidden states `(nsamples, seqlen, width)` entering it, on the CPU.
        call: its other arguments.
        watched: names of the linears to look at, in the order of calls. What is in their places
            now is looked at, compressed or not.
        writers: as in `Wiring`; `before` is filled in for those among `watched`.
        whole: run to the end of the block; otherwise the last watched linear is not run.
        device: where the block runs; None = where it is.
        advance: called with 1 after every window.

    Raises:
        NonFiniteError: a linear is given NaN or Inf.
    """
    with placed(block, device) as place, ExitStack() as hooks:
        call = call.to(place)
        runs = _Run(tuple(watched), tuple(writers), whole)
        for name in dict.fromkeys([*watched, *writers]):
            linear = block.get_submodule(name)
            hooks.callback(linear.register_forward_pre_hook(runs.given(name)).remove)
            if name in writers:
                hooks.callback(linear.register_forward_hook(runs.gives(name)).remove)
        for n in range(len(hidden)):
            x = hidden[n : n + 1].to(place, copy=True)
            runs.begin(x)
            with suppress(_Enough):
                runs.look.out = call.run(block, x.clone())
            for name, given in runs.look.inputs.items():
                if not torch.isfinite(given).all():
                    raise NonFiniteError(
                        f"{name} of {call.name} is given NaN or Inf in calibration window {n}: the "
                        f"activations overflow {given.dtype}, or a linear before it was "
                        "compressed badly; try --dtype float32"
                    )
            yield runs.look
            if advance:
                advance(1)


class _Run:
    """Hooks that write down one run."""

    def __init__(self, watched: tuple[str, ...], writers: tuple[str, ...], whole: bool) -> None:
        self.watched, self.writers, self.whole = watched, writers, whole
        self.look = Look()
        self._stream = torch.empty(0)

    def begin(self, hidden: Tensor) -> None:
        self.look, self._stream = Look(), hidden[0]

    def given(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if name in self.watched:
                self.look.inputs[name] = args[0].reshape(-1, args[0].shape[-1])
                if name in self.writers:
                    self.look.before[name] = self._stream
                if not self.whole and len(self.look.inputs) == len(self.watched):
                    raise _Enough

        return hook

    def gives(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            self._stream = self._stream + out.view(self._stream.shape)

        return hook
