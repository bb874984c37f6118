"""How one decoder block is called, apart from the hidden states it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from subbit.errors import ModelError

__all__ = ["BlockCall", "check_same_call", "hidden_of", "same_tensor", "split_call"]

_HIDDEN = "hidden_states"
_CACHES = ("past_key_value", "past_key_values", "layer_past")


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block beside the hidden states: the same for every window.

    Attributes:
        name: dotted name of the block in the model, for messages.
        args: positional arguments after the hidden states.
        kwargs: keyword arguments (attention mask, position embeddings, ...), caches dropped.
        hidden_key: the keyword that takes the hidden states, or None if they come first.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: str | None

    def to(self, device: torch.device) -> "BlockCall":
        """Return the same call with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device))

    def float(self) -> "BlockCall":
        """Return the same call with its floating-point tensors in float32."""
        return self._mapped(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "BlockCall":
        args, kwargs = (_map_tensors(held, function) for held in (self.args, self.kwargs))
        return BlockCall(self.name, args, kwargs, self.hidden_key)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call `block` on `hidden` `(1, seqlen, width)` and return the new hidden states."""
        if self.hidden_key is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.hidden_key: hidden}, **self.kwargs))


def hidden_of(output: Any) -> Any:
    """Return the hidden states in a block's output: the tensor itself or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def split_call(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Return the hidden states in the arguments of a block, and the rest without caches.

    Raises:
        ModelError: no hidden states are found.
    """
    rest = {k: None if k in _CACHES else _drop_cache(v) for k, v in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(name, tuple(map(_drop_cache, args[1:])), rest, None)
    if isinstance(rest.get(_HIDDEN), Tensor):
        hidden = rest.pop(_HIDDEN)
        return hidden, BlockCall(name, tuple(map(_drop_cache, args)), rest, _HIDDEN)
    raise ModelError(
        f"{name} is called without hidden states as first argument or as '{_HIDDEN}'; "
        "such models are not supported"
    )


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """Say whether both tensors hold the same values; NaN equals NaN (it is refused elsewhere)."""
    if left is right:
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left, right) or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def check_same_call(call: BlockCall, other: BlockCall) -> None:
    """Check that a block is called the same way on two different windows.

    Raises:
        ModelError: names the block and the argument that differs.
    """
    ours = {str(i): value for i, value in enumerate(call.args)} | call.kwargs
    theirs = {str(i): value for i, value in enumerate(other.args)} | other.kwargs
    for key in sorted(ours.keys() | theirs.keys()):
        _check_same(ours.get(key), theirs.get(key), key, call.name)


def _check_same(ours: Any, theirs: Any, argument: str, name: str) -> None:
    if ours is theirs:
        return
    if isinstance(ours, tuple | list) and type(ours) is type(theirs) and len(ours) == len(theirs):
        for i, (left, right) in enumerate(zip(ours, theirs)):
            _check_same(left, right, f"{argument}[{i}]", name)
        return
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            _check_same(ours[key], theirs[key], f"{argument}[{key!r}]", name)
        return
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        same = same_tensor(ours, theirs)
    else:
        same = isinstance(ours, bool | int | float | str) and ours == theirs
    if not same:
        raise ModelError(
            f"{name} takes an input that depends on the text, argument '{argument}', so it cannot "
            "be run from its hidden states alone; such models are not supported"
        )


def _drop_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
