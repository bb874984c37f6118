"""Plain binarisation of every row, or of every group of a row's columns (XNOR-Net's weights)."""

import torch
from pydantic import Field
from torch import Tensor

from subbit.binarize.spbo import binarize_part
from subbit.codes import CompressedLinear
from subbit.methods.assemble import CodedBlock, assemble, code_part, storing
from subbit.methods.base import LinearStats, Method, Options

__all__ = ["XNOR", "XNOROptions"]


class XNOROptions(Options):
    """Options of plain binarisation.

    `group_size`: columns that share a scale, None = the whole row; `mean`: subtract the mean of
    these weights first, and store it.
    """

    group_size: int | None = Field(128, ge=1)
    mean: bool = False


class XNOR(Method):
    """`alpha sign(w)` with alpha the mean of |w|: least squares without calibration."""

    name = "xnor"
    paper = "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"
    year = 2016
    summary = "sign and mean magnitude of every row or group; needs no calibration"
    nm_use = "none"
    int8_levels = True
    Opt = XNOROptions
    options: XNOROptions

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        o = self.options
        size = min(o.group_size or W.shape[1], W.shape[1])
        blocks, as_stored = [], storing(self.settings.levels, W)
        for block in W.split(size, 1):
            everything = torch.ones(1, *block.shape, dtype=torch.bool, device=W.device)
            part = binarize_part(block, everything, 1, means=o.mean)
            labels = torch.zeros_like(block, dtype=torch.uint8)
            coded = CodedBlock(*code_part(part, labels, o.mean))
            blocks.append(as_stored(coded))
        return assemble(blocks, size, None, {})
