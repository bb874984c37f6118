"""What binarising intervals of sorted weights explains, for many intervals of many rows at once."""

import torch
from torch import Tensor

__all__ = ["SortedRows"]


class SortedRows:
    """Rows of values in ascending order, with prefix sums: any interval costs a few look-ups.

    An interval of a row is `[lo, hi)` in sorted order. All arithmetic is float64.

    Args:
        values: float `(rows, b)`.
        support: bool `(rows, b)`: the values that count.
    """

    def __init__(self, values: Tensor, support: Tensor) -> None:
        self._sorted = torch.where(support, values, torch.inf).double().sort(dim=1).values
        finite = torch.where(self._sorted.isfinite(), self._sorted, 0.0)
        self._sums = torch.nn.functional.pad(finite.cumsum(1), (1, 0))
        self.count = support.sum(1, keepdim=True)

    def upto(self, edges: Tensor) -> Tensor:
        """How many values of each row are <= each of the edges `(E,)`; int64 `(rows, E)`."""
        edges = edges.double().expand(len(self._sorted), -1).contiguous()
        return torch.searchsorted(self._sorted, edges, right=True).clamp_max(self.count)

    def explained(self, lo: Tensor, hi: Tensor, planes: int, means: int) -> Tensor:
        """Sum of squares that binarising an interval takes away, float64, shape of `lo`.

        Each pass of (residual) binarisation with mean m and mean magnitude a takes away
        `n (m^2 + a^2)` of the squares of its n values; see `spbo.binarize_part`.

        Args:
            lo, hi: int64 `(rows, K)`.
            planes: passes, 1 or 2.
            means: how many of them subtract a mean; without one in the first pass all values
                must be >= 0.
        """
        n = (hi - lo).clamp_min(1)
        total = self._sums.gather(1, hi) - self._sums.gather(1, lo)
        if planes == 1 and means == 0:
            return total.square() / n
        mean = total / n if means > 0 else torch.zeros_like(total)
        cut, spread = self._spread(lo, hi, mean)
        alpha = spread / n
        gain = n * (mean.square() + alpha.square())
        if planes == 2:
            # the residuals of both halves are the values around mean - alpha and mean + alpha
            second = alpha * ((cut - lo) - (hi - cut)) / n if means > 1 else 0.0
            low = self._spread(lo, cut, mean - alpha + second)[1]
            high = self._spread(cut, hi, mean + alpha + second)[1]
            gain = gain + n * (((low + high) / n).square() + second**2)
        return gain * (hi > lo)

    def _spread(self, lo: Tensor, hi: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Where an interval passes its centre, and the sum of distances from the centre."""
        cut = torch.searchsorted(self._sorted, centre).clamp(lo, hi)
        at_lo, at_cut, at_hi = (self._sums.gather(1, i) for i in (lo, cut, hi))
        below = (cut - lo) * centre - (at_cut - at_lo)
        above = (at_hi - at_cut) - (hi - cut) * centre
        return cut, below + above
