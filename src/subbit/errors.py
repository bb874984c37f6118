"""Errors that a user can act on.

Every message is one clear sentence: what is wrong, where (module, shape, value), what to do next.
The command line prints the message alone and leaves with `exit_code`; anything else is a bug
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "FormatError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "RecipeError",
    "StudyError",
    "SubbitError",
    "nearest",
]


class SubbitError(Exception):
    """Base of every error that names its cause and its remedy."""

    exit_code = 1


class RecipeError(SubbitError, ValueError):
    """A recipe or an option that means nothing or contradicts itself."""

    exit_code = 2


class ModelError(SubbitError):
    """A model that cannot be found, read, or compressed without skipping weights."""

    exit_code = 3


class NonFiniteError(ModelError):
    """NaN or Inf in weights, activations or statistics; the message names the module."""


class CalibrationError(SubbitError):
    """Calibration or evaluation text that is missing or too short."""

    exit_code = 4


class FormatError(SubbitError):
    """A packed file that is damaged, truncated, or newer than this program."""

    exit_code = 5


class OutputError(SubbitError):
    """An output folder that exists already or cannot be written."""

    exit_code = 6


class CheckpointError(SubbitError):
    """An interrupted run that cannot be resumed as asked."""

    exit_code = 7


class StudyError(SubbitError):
    """Cells of a study that could not be measured; the others were."""

    exit_code = 8


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known word, or a list of the known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
