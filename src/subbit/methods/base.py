"""The contract that every method keeps, and what they all do before and after their own work."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from subbit.codes import CompressedLinear, on_int8_grid
from subbit.errors import ModelError, NonFiniteError, RecipeError, nearest
from subbit.linalg import Factor, relative_loss

__all__ = ["LinearStats", "Method", "Options", "Settings", "damping_record"]


class Options(BaseModel):
    """Base of a method's own options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class LinearStats:
    """What calibration says about one linear.

    Attributes:
        H: float32 `(cols, cols)`, `sum x^T x` over the calibration tokens.
        tokens: how many tokens that was.
        name: the linear's dotted name, for messages and seeds.
    """

    H: Tensor
    tokens: int
    name: str = "linear"


@dataclass(frozen=True)
class Settings:
    """What every method is told besides its own options.

    Attributes:
        levels: how levels are stored: "fp16" parameters, or "int8" levels on one scale for each
            row and column group (`codes.on_int8_grid`), which the fast kernels need.
    """

    blocksize: int = 128
    percdamp: float = 0.01
    seed: int = 0
    levels: Literal["fp16", "int8"] = "fp16"


class Method(ABC):
    """One published method.

    Class attributes say what `subbit methods` prints; `Opt` is its options' model.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    summary: ClassVar[str]
    Opt: ClassVar[type[Options]] = Options

    def __init__(
        self, options: dict[str, Any] | None = None, settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.options = _parse(self.Opt, self.name, options or {})

    def compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int]) -> CompressedLinear:
        """Compress one linear.

        Args:
            W: float32 `(rows, cols)`; not modified.
            stats: its calibration statistics.
            nm: `(N, M)`, N kept of every M consecutive columns.

        Returns:
            Codes and levels, with `loss`, `salient_share`, `damping`, `tokens` in the record.

        Raises:
            NonFiniteError: NaN or Inf in W or H, named.
            ModelError: shapes that do not fit each other.
        """
        _check(W, stats)
        result = self._compress(W, stats, nm)
        if self.settings.levels == "int8":  # of a method without blocks; blocks are snapped already
            levels, salient_levels = on_int8_grid(result.levels, result.salient_levels)
            result = replace(result, levels=levels, salient_levels=salient_levels)
        record = {
            "loss": relative_loss(W, result.dequantize(), stats.H),
            "salient_share": _salient_share(result),
            "tokens": stats.tokens,
            **result.record,
        }
        return replace(result, record=record)

    @abstractmethod
    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int]) -> CompressedLinear:
        """The method itself, on checked input."""


def damping_record(factor: Factor) -> dict[str, Any]:
    """What a record says of the factorisation; damping None = only the diagonal of H was used."""
    damping = factor.damping if isfinite(factor.damping) else None
    return {"damping": damping, "dead_columns": int(factor.dead.sum())}


def _parse(model: type[Options], method: str, options: dict[str, Any]) -> Options:
    try:
        return model(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(key, model.model_fields)
            raise RecipeError(f"method '{method}' has no option '{key}'{hint}") from None
        raise RecipeError(f"option '{key}' of method '{method}': {first['msg']}") from None


def _check(W: Tensor, stats: LinearStats) -> None:
    if W.ndim != 2 or stats.H.shape != (W.shape[1], W.shape[1]):
        raise ModelError(
            f"{stats.name}: weight {tuple(W.shape)} and H {tuple(stats.H.shape)} do not fit; "
            "H must be (cols, cols)"
        )
    if stats.tokens < 1:
        raise ModelError(
            f"{stats.name}: no calibration token reached it; check the model or skip it"
        )
    for what, tensor in (("weights", W), ("H (calibration inputs)", stats.H)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"{stats.name}: {bad} NaN or Inf values in its {what}; "
                "repair the checkpoint or load it in float32"
            )


def _salient_share(result: CompressedLinear) -> float:
    return 0.0 if result.salient is None else float(result.salient.float().mean())
