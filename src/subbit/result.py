"""What `compress` returns: the packed model, how it came about, and how to write it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from subbit.hub.atomic import save_atomically
from subbit.hub.save import save_packed
from subbit.recipe import Recipe
from subbit.run.log import LinearLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CompressedModel", "totals"]


@dataclass
class CompressedModel:
    """What `compress` returns.

    Attributes:
        model: the model, its linears replaced by `PackedLinear`s.
        tokenizer: its tokenizer, or None.
        recipe: the recipe that was used, all overrides applied.
        calibration: where the calibration tokens came from, and their fingerprint.
        records: dotted name of each linear -> facts about its fit; the same in every run.
        report: totals of this run: seconds a stage, peak memory, kept weights, bits.
        log: one line per linear, as in `compression.jsonl`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    recipe: Recipe
    calibration: dict[str, Any]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    base_model: str | None = None

    def save_pretrained(self, out: str | Path, max_shard_size: str = "5GB") -> None:
        """Write the packed model folder, atomically; see `subbit.load`.

        Raises:
            OutputError: `out` exists or cannot be made.
        """
        save_atomically(Path(out), lambda folder: self.write(folder, max_shard_size))

    def write(self, folder: Path, max_shard_size: str = "5GB") -> None:
        """Fill an existing folder with the packed model and its log."""
        save_packed(
            self.model,
            self.tokenizer,
            folder,
            recipe=self.recipe.model_dump(mode="json"),
            calibration=self.calibration,
            records=self.records,
            base_model=self.base_model,
            max_shard_size=max_shard_size,
        )
        with LinearLog(folder / "compression.jsonl", self.log) as log:
            log.write({"run": self.report})


def totals(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a report says of all linears: how many, their weights, mean loss and bits.

    Args:
        records: facts about the fit of each linear, as in `CompressedModel.records`. Bits and the
            share of salient columns are averaged over weights, the loss over linears.
    """
    records = list(records)
    of_original = [r["loss_of_original"] for r in records if "loss_of_original" in r]
    weights = [record["shape"][0] * record["shape"][1] for record in records]

    def mean(key: str) -> float:
        return sum(r[key] * w for r, w in zip(records, weights)) / sum(weights)

    return {
        "linears": len(weights),
        "weights": sum(weights),
        "mean_loss": fmean(record["loss"] for record in records),
        **({"mean_loss_of_original": fmean(of_original)} if of_original else {}),
        "paper_bits": mean("paper_bits"),
        "stored_bits": mean("stored_bits"),
        "salient_share": mean("salient_share"),
    }
