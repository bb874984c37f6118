"""ARB-LLM: alternating refined binarisations (Li et al., 2025)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.arb import refine
from subbit.binarize.row_column import fit_row_column
from subbit.binarize.spbo import Part, alternate, binarize_part
from subbit.errors import RecipeError
from subbit.linalg import BlockView
from subbit.methods.assemble import FittedPart
from subbit.methods.grouped import GroupedMethod, GroupedOptions

__all__ = ["ARB", "ARBOptions"]


class ARBOptions(GroupedOptions):
    """Options of ARB-LLM.

    `variant`: "arb" refines mean, scales and signs on the weights; "arb-x" then refines mean and
    scales on the calibration inputs; "arb-rc" has scales of rows and columns instead of a mean.
    `cgb` (column-group bitmap) parts the salient weights in two groups as well.
    """

    variant: Literal["arb", "arb-x", "arb-rc"] = "arb"
    cgb: bool = False
    iterations: int = Field(15, ge=0)


class ARB(GroupedMethod):
    """BiLLM's structure with every part's mean, scales and signs refined in turn.

    The published code searches the groups on the score matrix, and starts the salient part with a
    mean in both passes (docs/differences.md).
    """

    name = "arb"
    paper = "ARB-LLM: Alternating Refined Binarizations for Large Language Models"
    year = 2025
    summary = "BiLLM's groups; mean, scales and signs refined in turn (ARB, ARB-X, ARB-RC; CGB)"
    Opt = ARBOptions
    options: ARBOptions

    @property
    def split_salient(self) -> bool:
        return self.options.cgb

    @property
    def mean(self) -> bool:
        return self.options.variant != "arb-rc"

    @property
    def published_on_inputs(self) -> bool:
        return self.options.variant == "arb-x"

    def _check_int8(self) -> None:
        super()._check_int8()
        if self.options.variant == "arb-rc":
            raise RecipeError(
                f"method '{self.name}' with variant arb-rc has levels of its own in every column, "
                "which int8 on one scale for each row and block cannot hold; write levels: fp16"
            )

    def _fit(self, block: BlockView, columns: Tensor, support: Tensor, planes: int) -> FittedPart:
        o, W = self.options, block.W[:, columns]
        if o.variant == "arb-rc":
            return fit_row_column(W, support, planes, o.iterations)
        means = planes if o.published else 1
        part = refine(W, binarize_part(W, support, planes, means=means), o.iterations)
        if o.variant == "arb" or W.shape[1] == 0:
            return part
        return _refine_on_inputs(W, block.S, columns, part, o)


def _refine_on_inputs(
    W: Tensor, S: Tensor, columns: Tensor, part: Part, options: ARBOptions
) -> Part:
    """ARB-X: mean and scales refined in turn on the calibration inputs, the signs left alone."""
    carrier = part.support.to(W.dtype)
    planes = torch.cat((carrier.unsqueeze(-2), part.signs), -2)
    S = S[columns][:, columns]
    params = alternate(planes, W * carrier, S, part.params, options.iterations)
    return Part(part.support, part.signs, params)
