"""Text of the Hugging Face hub, through `datasets`."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from subbit.errors import CalibrationError

__all__ = ["HubText"]


@dataclass(frozen=True)
class HubText:
    """One split of a hub dataset, as `datasets.load_dataset` wants it.

    Attributes:
        repo: dataset repository.
        split: split name.
        field: column that holds the text.
        arguments: further keyword arguments of `load_dataset`.
        limit: rows to take, streamed so that no whole corpus is downloaded; None = the whole split.
    """

    repo: str
    split: str
    field: str
    arguments: dict[str, Any]
    limit: int | None = None

    @property
    def origin(self) -> str:
        """Repository and split, for the record."""
        return f"hub dataset {self.repo}, {self.split}"

    def documents(self, source: str) -> list[str]:
        """Return the rows' text; `source` is the name the user gave, for the error.

        Raises:
            CalibrationError: the hub cannot be reached or the dataset cannot be read.
        """
        try:
            from datasets import load_dataset

            rows = load_dataset(
                self.repo, split=self.split, streaming=self.limit is not None, **self.arguments
            )
            return [row[self.field] for row in islice(rows, self.limit)]
        # datasets raises many unrelated types when a host, a proxy or a repository fails
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CalibrationError(
                f"the hub cannot be reached for '{source}' ({self.repo}: {reason}); set "
                "SUBBIT_DATA to a folder that holds the text, give a .txt or .jsonl file, or use "
                "'stdlib', which needs no download"
            ) from error
