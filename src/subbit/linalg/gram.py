"""The Gram matrix H = sum x^T x of a linear's calibration inputs, and the loss it measures."""

import torch
from torch import Tensor

__all__ = ["GramAccumulator", "PairAccumulator", "error_energy", "relative_loss"]

_STRIPE = 256  # columns of H computed at a time; only the lower triangle is


class GramAccumulator:
    """Accumulates `H = sum_t x_t^T x_t`, un-normalised, with an integer token count.

    Un-normalised sums with an exact count can be added over machines in any order.

    Attributes:
        tokens: calibration tokens seen so far.
        weight: what they count together: as many, where none was weighed.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._lower = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens, self.weight = 0, 0.0

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs `(..., features)` of any float dtype; `weight` `(tokens,)`: of each."""
        x = x.reshape(-1, x.shape[-1]).to(device=self._lower.device, dtype=torch.float32)
        weighted = _weighted(x, weight)
        for start in range(0, x.shape[1], _STRIPE):
            stripe = weighted[:, start : start + _STRIPE]
            self._lower[start:, start : start + _STRIPE].addmm_(x[:, start:].T, stripe)
        self._sum += weighted.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]
        self.weight += x.shape[0] if weight is None else float(weight.sum(dtype=torch.float64))

    @property
    def H(self) -> Tensor:
        """The sum, float32 `(features, features)`, exactly symmetric."""
        lower = self._lower.tril()
        return lower + lower.tril(-1).T

    @property
    def mean(self) -> Tensor:
        """The mean input, weighed as H is, float32 `(features,)`; 0 before the first token."""
        return (self._sum / (self.weight or 1.0)).float()


class PairAccumulator(GramAccumulator):
    """Accumulates, beside H, what the original model's inputs and hidden states have to say.

    Attributes:
        C: `sum x_original^T x`, float32 `(features, features)`.
        D: `sum gap^T x`, float32 `(outputs, features)`, or None: no gap was ever given.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self.C = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.D: Tensor | None = None

    def add_pair(
        self,
        x: Tensor,
        original: Tensor,
        gap: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Add inputs, and what stands in their place in the original model.

        Args:
            x: `(tokens, features)` of any float dtype.
            original: same shape: the original model's inputs for the same tokens.
            gap: `(tokens, outputs)`: what the linear's output should make up for, besides.
            weight: `(tokens,)`: what each token counts.
        """
        self.add(x, weight)
        x = _weighted(x.to(device=self.C.device, dtype=torch.float32), weight)
        self.C.addmm_(original.to(x).T, x)
        if gap is not None:
            if self.D is None:
                self.D = x.new_zeros(gap.shape[1], x.shape[1])
            self.D.addmm_(gap.to(x).T, x)

    def pull(self, W: Tensor) -> Tensor:
        """`W (C - H) + D`, float32 as `W` `(rows, features)`.

        Minus half the slope in W of how far `x W^T` is from the original model's outputs, squared.
        """
        pull = W @ (self.C - self.H)
        return pull if self.D is None else pull + self.D


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight.to(x)[:, None]


def relative_loss(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """Return `tr(E H E^T) / tr(W H W^T)` with `E = W - W_hat`; 0 where the denominator is 0.

    Args:
        W: the original weight, float32 `(rows, cols)`.
        W_hat: what replaces it, same shape.
        H: `(cols, cols)`, undamped.
    """
    error, energy = error_energy(W - W_hat, H), error_energy(W, H)
    return error / energy if energy > 0 else 0.0


def error_energy(E: Tensor, H: Tensor) -> float:
    """`tr(E H E^T)`; row by row first, so that it does not depend on the number of threads."""
    return float(((E @ H) * E).sum(-1, dtype=torch.float64).sum())
