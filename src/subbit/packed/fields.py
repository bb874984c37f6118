"""What all layouts have in common: a table of stored tensors, sizes, JSON, refusal of nonsense."""

from dataclasses import MISSING, asdict, fields
from math import prod
from typing import Any, NamedTuple, Self

import torch

from subbit.errors import FormatError, nearest

__all__ = ["FORMAT_VERSION", "BaseLayout", "Field", "bad_value", "check_int"]

FORMAT_VERSION = 2
"""Version of the byte layout; a change of any byte changes it. 2 came with `row_scale`."""

MAX_SIZE = 2**31 - 1


class Field(NamedTuple):
    """Shape and dtype of one stored tensor.

    A tensor of two or more dimensions holds a stream a row, so that a range of rows is a slice of
    it; one of one dimension is about all rows.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class BaseLayout:
    """Base of the layouts, frozen dataclasses with at least `rows` and `cols`."""

    rows: int
    cols: int

    def fields(self) -> dict[str, Field]:
        """THE table: name -> shape and dtype of every stored tensor, in order."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.nbytes for field in self.fields().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense shape."""
        return 8 * self.nbytes / (self.rows * self.cols)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; what has its default value is left out."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if defaults[name] is MISSING or value != defaults[name]
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Undo `to_dict`.

        Raises:
            FormatError: an unknown or missing key, or a value that means nothing.
        """
        if not isinstance(data, dict):
            raise bad_value("itself", data, "an object")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        for key in data:
            if key not in known:
                raise FormatError(
                    f"packed layout has an unknown key {key!r}{nearest(str(key), known)}: "
                    "the file is damaged or newer than this program."
                )
        for key, needed in known.items():
            if needed and key not in data:
                raise FormatError(
                    f"packed layout lacks the key {key!r}: the file is damaged; fetch it again."
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def bad_value(name: str, value: object, wanted: str) -> FormatError:
    """The refusal of a layout's value."""
    return FormatError(
        f"packed layout: {name} is {value!r:.80} but must be {wanted}; "
        "the file is damaged or newer than this program."
    )


def is_int(value: object) -> bool:
    """Whether `value` is a whole number and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: object, low: int = 1, high: int = MAX_SIZE) -> None:
    """Refuse what is not an integer from `low` to `high`.

    Raises:
        FormatError: names `name` and the value.
    """
    if not is_int(value) or not low <= value <= high:
        raise bad_value(name, value, f"an integer from {low} to {high}")
