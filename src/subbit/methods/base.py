"""The contract that every method keeps, and what they all do before and after their own work."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from subbit.codes import Compressed
from subbit.errors import ModelError, NonFiniteError, RecipeError, nearest
from subbit.linalg import Factor, relative_loss

__all__ = ["LinearStats", "Method", "Options", "Settings", "SplitGrid", "damping_record"]


class Options(BaseModel):
    """Base of a method's own options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_grid(grid: tuple[float, float, int]) -> tuple[float, float, int]:
    first, last, count = grid
    if not (0 < first <= last <= 1 and count >= 3):
        raise ValueError(
            "must be (first, last, count): 0 < first <= last <= 1, at least 3 candidates"
        )
    return grid


SplitGrid = Annotated[tuple[float, float, int], AfterValidator(_checked_grid)]
"""Candidates for a split point: shares of the largest weight, evenly spaced, and how many."""


@dataclass(frozen=True)
class LinearStats:
    """What calibration says about one linear.

    Attributes:
        H: float32 `(cols, cols)`, `sum x^T x` over the calibration tokens.
        tokens: how many tokens that was.
        name: the linear's dotted name, for messages and seeds.
        mean: mean input, float32 `(cols,)`, or None where nobody asked for it; weighed as H is.
        G: float32 `(rows, rows)`, `sum g^T g` of the gradients in its outputs, or None: outputs
            count alike.
        weight: what the tokens count together in H, or None: each counts 1.
    """

    H: Tensor
    tokens: int
    name: str = "linear"
    mean: Tensor | None = None
    G: Tensor | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Settings:
    """What every method is told besides its own options.

    Attributes:
        levels: how levels are stored: "fp16" parameters, or "int8" levels on one scale for each
            row and column group (`codes.on_int8_grid`), which the fast kernels need, or
            "int8-row", on one scale for each row, from its largest weight.
    """

    blocksize: int = 128
    percdamp: float = 0.01
    seed: int = 0
    levels: Literal["fp16", "int8", "int8-row"] = "fp16"


class Method(ABC):
    """One published method.

    Class attributes say what `subbit methods` prints; `Opt` is its options' model. `nm_use` says
    whether it prunes: it needs an N:M, takes one or None, or takes None only. `int8_levels` says
    whether its levels can be stored as int8, which it then does block by block
    (`assemble.storing`).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    summary: ClassVar[str]
    Opt: ClassVar[type[Options]] = Options
    nm_use: ClassVar[Literal["needed", "optional", "none"]] = "needed"
    int8_levels: ClassVar[bool] = False

    def __init__(
        self, options: dict[str, Any] | None = None, settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.options = _parse(self.Opt, self.name, options or {})
        if self.settings.levels != "fp16":
            self._check_int8()

    def check_nm(self, nm: tuple[int, int] | None) -> None:
        """Refuse an N:M that this method cannot follow, or its absence.

        Raises:
            RecipeError: says what to write instead.
        """
        if nm is None and self.nm_use == "needed":
            raise RecipeError(f"method '{self.name}' prunes; give it nm, such as nm: '4:8'")
        if nm is not None and self.nm_use == "none":
            raise RecipeError(
                f"method '{self.name}' does not prune, so that nm '{nm[0]}:{nm[1]}' means nothing; "
                "write nm: null"
            )

    def check_outputs(self) -> None:
        """Refuse gradients in the outputs of linears (`LinearStats.G`) where they do nothing.

        Raises:
            RecipeError: says what to write instead.
        """
        raise RecipeError(
            f"method '{self.name}' takes no notice of gradients; write calibration.outputs: equal"
        )

    def _check_int8(self) -> None:
        """Raise RecipeError where int8 levels would mean nothing to this method or its options."""
        if not self.int8_levels:
            raise RecipeError(
                f"method '{self.name}' has no levels that could be int8 on one scale for each row "
                "and block; write levels: fp16"
            )

    def compress(
        self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None = None
    ) -> Compressed:
        """Compress one linear.

        Args:
            W: float32 `(rows, cols)`; not modified.
            stats: its calibration statistics.
            nm: `(N, M)`, N kept of every M consecutive columns; None = no weight is pruned.

        Returns:
            Codes and levels, or 16-bit values under a mask, with `loss`, `salient_share`,
            `damping`, `tokens` in the record.

        Raises:
            RecipeError: an N:M that the method cannot follow.
            NonFiniteError: NaN or Inf in W or H, named.
            ModelError: shapes that do not fit each other.
        """
        self.check_nm(nm)
        _check(W, stats)
        result = self._compress(W, stats, nm)
        record = {
            "loss": relative_loss(W, result.dequantize(), stats.H),
            "salient_share": result.salient_share,
            "tokens": stats.tokens,
            "damping": None,
            **result.record,
        }
        return replace(result, record=record)

    @abstractmethod
    def _compress(self, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None) -> Compressed:
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
    if stats.mean is not None and stats.mean.shape != W.shape[1:]:
        raise ModelError(
            f"{stats.name}: weight {tuple(W.shape)} and mean input {tuple(stats.mean.shape)} do "
            "not fit; it must be (cols,)"
        )
    if stats.G is not None and stats.G.shape != (len(W), len(W)):
        raise ModelError(
            f"{stats.name}: weight {tuple(W.shape)} and G {tuple(stats.G.shape)} do not fit; "
            "G must be (rows, rows)"
        )
    for what, tensor in (
        ("weights", W),
        ("H (calibration inputs)", stats.H),
        ("mean (calibration inputs)", stats.mean),
        ("G (gradients of its outputs)", stats.G),
    ):
        if tensor is None:
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"{stats.name}: {bad} NaN or Inf values in its {what}; "
                "repair the checkpoint or load it in float32"
            )
