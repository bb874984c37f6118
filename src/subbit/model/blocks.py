"""Find the decoder blocks of any causal LM and the linears in them, without knowing its family."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from subbit.errors import ModelError

__all__ = ["Blocks", "find_blocks", "find_linears", "replace_module", "weight_of"]

_LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Attributes:
        path: dotted name of their `nn.ModuleList` in the model, e.g. `model.layers`.
        modules: the blocks, in order.
    """

    path: str
    modules: list[nn.Module]

    def name(self, index: int) -> str:
        """Return the dotted name of block `index` in the model."""
        return f"{self.path}.{index}"


def find_blocks(model: nn.Module) -> Blocks:
    """Return the decoder blocks: the heaviest outermost `nn.ModuleList` that holds linears.

    Lists inside a block (experts, say) are not outermost; a second stack beside the decoder, such
    as a vision tower, is left to `check_coverage` to refuse.

    Raises:
        ModelError: no such list.
    """
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in candidates)
        if isinstance(module, nn.ModuleList) and not nested and _holds_linears(module):
            candidates[name] = module
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: no nn.ModuleList in it holds linear "
            "layers; subbit compresses causal LMs made of a list of blocks of linears"
        )
    path = max(candidates, key=lambda name: sum(p.numel() for p in candidates[name].parameters()))
    return Blocks(path, list(candidates[path]))


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linears of one block by their name relative to it, in module order.

    A linear is an `nn.Linear`, a transformers `Conv1D`, or a subclass of them whose output is
    still `x Wᵀ + b`.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, _LINEAR_TYPES) and _is_plain(module)
    }


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear as `(outputs, inputs)`: a view of its parameter.

    `Conv1D` stores the transpose.
    """
    weight = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def replace_module(model: nn.Module, dotted_name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `dotted_name` in `model`.

    Raises:
        ModelError: there is no module of that name.
    """
    try:
        model.get_submodule(dotted_name)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module '{dotted_name}' to replace"
        ) from error
    model.set_submodule(dotted_name, new)


def _holds_linears(module: nn.Module) -> bool:
    return any(isinstance(child, _LINEAR_TYPES) for child in module.modules())


def _is_plain(linear: nn.Module) -> bool:
    if linear.weight.ndim != 2 or not linear.weight.is_floating_point():
        return False
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    # A subclass with its own forward (router, low-rank adapter, ...): believe only what it does.
    weight = weight_of(linear)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
    try:
        with torch.no_grad():
            y = linear(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    plain = F.linear(x, weight, linear.bias)
    return isinstance(y, Tensor) and y.shape == plain.shape and torch.allclose(y, plain, rtol=1e-2)
