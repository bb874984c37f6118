"""RTN: round to nearest, the baseline that looks at no input."""

from torch import Tensor

from subbit.codes import CompressedLinear
from subbit.methods.base import LinearStats, Method
from subbit.methods.grids import GridOptions, round_linear

__all__ = ["RTN"]


class RTN(Method):
    """Every weight to the nearest of 2^k levels between its group's smallest and largest weight.

    `q = clamp(round(w / s) + z, 0, 2^k - 1)`, `s = (max - min) / (2^k - 1)`, `z = round(-min / s)`,
    the range widened to hold 0. Known for long; the form is that of GPTQ's baseline (Frantar et
    al., 2022).
    """

    name = "rtn"
    paper = "Round to nearest, as the baseline of GPTQ (arXiv 2210.17323)"
    year = 2022
    summary = "asymmetric 1 to 4 bit grid, each weight by itself; looks at no input"
    nm_use = "none"
    Opt = GridOptions
    options: GridOptions

    def _compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> CompressedLinear:
        size = self.settings.blocksize if self.options.group == "block" else W.shape[1]
        return round_linear(W, size, self.options.bits)
