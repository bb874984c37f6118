"""The log of a run: one JSON line per linear, on disk before the next linear begins."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from subbit.errors import OutputError

__all__ = ["LOG_FIELDS", "LinearLog"]

LOG_FIELDS: dict[str, str] = {
    "block": "index of the decoder block, from 0",
    "name": "full name of the linear in the model",
    "shape": "[rows, cols] of its weight",
    "nm": "[N, M], N kept of every M, as given by the coarse stage; null where nothing is pruned",
    "loss": "tr((W-Q) H (W-Q)^T) / tr(W H W^T) on the calibration tokens, before refitting; W is "
    "what was aimed at, with `asymmetry` not the original weight",
    "loss_of_original": "only with `asymmetry`: the same with the original weight as W",
    "salient_share": "share of the columns that are salient",
    "damping": "share of mean(diag H) that was added to the diagonal of H",
    "tokens": "calibration tokens behind H",
    "paper_bits": "bits per weight as the papers count them",
    "stored_bits": "bits per weight in the packed file",
    "seconds": "time spent on this linear",
    "peak_rss_bytes": "highest resident memory of the process so far",
}


class LinearLog:
    """Append-only JSONL file. Keys of a line: those of `LOG_FIELDS`, and what a method adds.

    A number that is not finite is written as null (JSON has no NaN).

    Args:
        path: the file; an existing one is replaced.
        keep: lines that the file starts with: those of the blocks that a resumed run has already
            committed, so that a half-done block leaves no line behind.
    """

    def __init__(self, path: Path, keep: Iterable[dict[str, Any]] = ()) -> None:
        self._file = path.open("w", encoding="utf-8")
        for line in keep:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it.

        Raises:
            OutputError: the disk is full.
        """
        text = json.dumps(_finite(line), ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write {self._file.name}: {error.strerror or error}; make room and run the "
                "same command again to go on"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
