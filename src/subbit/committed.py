"""Compressed blocks as what is committed to disk of them, and back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from subbit.model import Blocks, replace_module
from subbit.packed.linear import PackedLinear
from subbit.packed.pack import read_layout
from subbit.recipe import RefitSpec
from subbit.refit import loose_tensors
from subbit.run.commits import Workdir

__all__ = ["CommittedBlocks", "commit_of", "restore_block"]

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


class CommittedBlocks:
    """What a run has on disk: every compressed block and, where all are refitted, each once more.

    Without a work folder nothing is kept: there are no committed blocks, and none are made.

    Args:
        workdir: where blocks are committed, or None.
        blocks: the decoder blocks of the model.
        names: names of the packed linears of every block.
        refit: what is refitted: how often blocks are committed, and what of them, depends on it.
    """

    def __init__(
        self, workdir: Workdir | None, blocks: Blocks, names: list[list[str]], refit: RefitSpec
    ) -> None:
        self._workdir, self._blocks, self._names, self._refit = workdir, blocks, names, refit
        self._all = len(blocks.modules)

    @property
    def count(self) -> int:
        """Blocks that are compressed and committed."""
        return 0 if self._workdir is None else min(self._workdir.committed, self._all)

    @property
    def is_compressed(self) -> bool:
        """Whether all blocks are compressed and committed."""
        return self.count == self._all

    @property
    def is_refitted(self) -> bool:
        """Whether all blocks are committed as refitting them together left them."""
        return self._workdir is not None and self._workdir.committed == 2 * self._all

    @property
    def is_done(self) -> bool:
        """Whether all that is to be committed is: only the writing was cut off."""
        return self.is_refitted if self._refit.model_steps else self.is_compressed

    def log(self) -> list[dict[str, Any]]:
        """Lines of the log that belong to the committed blocks."""
        return [line for i in range(self.count) for line in self._workdir.meta(i)["log"]]

    def commit(self, i: int, lines: list[dict[str, Any]]) -> None:
        """Commit block `i`, compressed, with its lines of the log."""
        if self._workdir is not None:
            loose = self._refit.steps > 0
            commit = commit_of(self._blocks.modules[i], self._names[i], lines, loose)
            self._workdir.commit(i, *commit)

    def commit_refitted(self, line: dict[str, Any]) -> None:
        """Commit all blocks behind the others, but for those that an interrupted run has there.

        Args:
            line: what the log says of refitting.
        """
        if self._workdir is None:
            return
        self._workdir.store("refit", line)
        for i in range(self._workdir.committed - self._all, self._all):
            lines = self._workdir.meta(i)["log"]
            commit = commit_of(self._blocks.modules[i], self._names[i], lines, True)
            self._workdir.commit(self._all + i, *commit)

    def refit_log(self) -> list[dict[str, Any]]:
        """What the log said of refitting, one line or none."""
        line = None if self._workdir is None else self._workdir.fetch("refit")
        return [line] if line else []

    def restore(
        self, i: int, linears: dict[str, nn.Module], dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        """Make block `i` what it was when it was last committed.

        Args:
            linears: its linears, still the original ones, by name.
            dtype: that the model runs in.

        Returns:
            Its lines of the log.
        """
        tensors, meta = self._workdir.load(self._all + i if self.is_refitted else i)
        restore_block(self._blocks.modules[i], linears, tensors, meta, dtype)
        return meta["log"]
