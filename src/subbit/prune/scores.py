"""Which weights matter: the metrics of the fine stage (PBS2P Table 4b)."""

import zlib

import torch
from torch import Tensor

from subbit.errors import RecipeError, nearest
from subbit.linalg import BlockView, Factor

__all__ = ["BY_ROW", "METRICS", "Scorer", "standardized_importance"]

METRICS = ("hessian", "wanda", "magnitude", "si", "ria", "random")
BY_ROW = ("wanda",)
"""Scores that are compared within a row where pruning is unstructured: Wanda finds it to matter."""


class Scorer:
    """Scores the weights of one linear, block by block; higher = more important.

    Args:
        metric: one of `METRICS`; "si" is STBLLM's standardised importance, "ria" what its code
            has in its place (Zhang et al., 2024, with exponent 1/2).
        W: the original weight `(rows, cols)`.
        H: its Gram matrix `(cols, cols)`, undamped.
        factor: the factorisation of H; only the Hessian metric needs it.
        hessian_score: which reading of "[H^-1]_qq" the Hessian metric takes: "cholesky"
            (`w^2 / U_qq^2`, SparseGPT's and BiLLM's), "printed" (`w^2 / [H^-1]_qq^2`, PBS2P 3.3
            to the letter), or "obs" (`w^2 / 2 [H^-1]_qq`, PBS2P Theorem 3.1).
        seed, name: with "random", the draw depends on both and on nothing else.

    Attributes:
        by_row: whether the metric is one of `BY_ROW`.

    Raises:
        RecipeError: unknown metric or reading.
    """

    def __init__(
        self,
        metric: str,
        W: Tensor,
        H: Tensor,
        factor: Factor | None = None,
        *,
        hessian_score: str = "cholesky",
        seed: int = 0,
        name: str = "",
    ) -> None:
        if metric not in METRICS:
            raise RecipeError(f"unknown fine_metric '{metric}'{nearest(metric, METRICS)}")
        self.metric = metric
        self.by_row = metric in BY_ROW
        self._input_norm = H.diagonal().clamp_min(0).sqrt()
        if metric == "hessian":
            if factor is None:
                raise ValueError("the hessian metric needs the factorisation of H.")
            self._denominator = _hessian_denominator(factor.U, hessian_score)
        elif metric == "si":
            self._whole = standardized_importance(W, self._input_norm)
        elif metric == "ria":
            self._whole = _relative_magnitude(W) * self._input_norm.sqrt()
        elif metric == "random":
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            self._whole = torch.rand(W.shape, generator=generator).to(W.device)

    def __call__(self, block: BlockView) -> Tensor:
        """Score one block's (compensated) weights; float32 `(rows, b)`."""
        return self.score(block.W, block.start)

    def score(self, W: Tensor, start: int = 0) -> Tensor:
        """Score weights `(rows, b)` that stand in the columns from `start` on; float32 alike."""
        columns = slice(start, start + W.shape[1])
        if self.metric == "hessian":
            return W.square() / self._denominator[columns]
        if self.metric == "wanda":
            return W.abs() * self._input_norm[columns]
        if self.metric == "magnitude":
            return W.abs()
        return self._whole[:, columns]


def _hessian_denominator(U: Tensor, reading: str) -> Tensor:
    if reading == "cholesky":
        return U.diagonal().square()
    inverse_diagonal = U.square().sum(0)  # diag(U^T U)
    if reading == "printed":
        return inverse_diagonal.square()
    if reading == "obs":
        return 2 * inverse_diagonal
    known = ("cholesky", "printed", "obs")
    raise RecipeError(f"unknown hessian_score '{reading}'{nearest(reading, known)}")


def standardized_importance(W: Tensor, input_norm: Tensor) -> Tensor:
    """STBLLM Eq. 3: standardised L1-relative magnitude times the input norm; `(rows, cols)`.

    0 where all weights are alike, a single one included. Columns without input come last: as
    printed their 0 is above every weight below the mean.
    """
    relative, live = _relative_magnitude(W), input_norm > 0
    known = relative[:, live] if live.any() else relative
    single = known.numel() == 1  # it is its own mean, and its deviation is 0 / 0
    spread = known.std(correction=0 if single else 1).clamp_min(torch.finfo(W.dtype).tiny)
    score = (relative - known.mean()) / spread * input_norm
    return score.masked_fill(~live, -torch.inf) if live.any() else score


def _relative_magnitude(W: Tensor) -> Tensor:
    """|w| as a share of its row's and of its column's, added up."""
    magnitude = W.abs()
    by_row = magnitude.sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    by_column = magnitude.sum(0, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    return magnitude / by_row + magnitude / by_column
