"""A compressed block as what is committed to disk of it, and back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from subbit.model import replace_module
from subbit.packed.linear import PackedLinear
from subbit.packed.pack import read_layout
from subbit.refit import loose_tensors

__all__ = ["commit_of", "restore_block"]

_LOOSE = "loose."  # names of the vectors in a commit that refitting has changed


def commit_of(
    block: nn.Module, linears: Iterable[str], lines: list[dict[str, Any]], loose: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts from which `restore_block` can rebuild a block.

    Args:
        block: the compressed block.
        linears: names of its packed linears.
        lines: those of the log that belong to it.
        loose: whether its norms and biases are not those of the original model any more.
    """
    packed = {name: block.get_submodule(name) for name in linears}
    tensors = {
        f"{name}.{field}": tensor
        for name, module in packed.items()
        for field, tensor in module.fields().items()
    }
    if loose:
        vectors = loose_tensors(block, packed)
        tensors |= {f"{_LOOSE}{name}": vector.detach() for name, vector in vectors.items()}
    layouts = {name: module.layout.to_dict() for name, module in packed.items()}
    return tensors, {"layouts": layouts, "log": lines}


def restore_block(
    block: nn.Module,
    linears: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Make a block of the original model what it was when it was committed.

    Args:
        block: the original block.
        linears: its linears by name.
        tensors, meta: from `commit_of`.
        dtype: that the model runs in.
    """
    for name, linear in linears.items():
        layout = read_layout(meta["layouts"][name])
        packed = PackedLinear(layout, linear.bias is not None, dtype, device="meta")
        state = {field: tensors[f"{name}.{field}"] for field in layout.fields()}
        if linear.bias is not None:
            state["bias"] = linear.bias.detach().to(dtype)
        packed.load_state_dict(state, assign=True)
        packed.to(linear.weight.device)
        packed.requires_grad_(False)
        replace_module(block, name, packed)
    for name, parameter in loose_tensors(block, linears).items():
        if f"{_LOOSE}{name}" in tensors:
            parameter.data.copy_(tensors[f"{_LOOSE}{name}"])
