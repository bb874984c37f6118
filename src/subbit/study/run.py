"""Run a study: its cells in order, then its table."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from subbit.errors import RecipeError, StudyError, SubbitError, nearest
from subbit.run.atomic import write_atomic
from subbit.study.cells import run_cell
from subbit.study.figure import draw
from subbit.study.studies import Study
from subbit.study.tables import markdown

__all__ = ["StudyResult", "run_study"]


@dataclass(frozen=True)
class StudyResult:
    """What a study ends with.

    Attributes:
        table: Markdown, a row for every cell that was measured; "" where none was.
        failures: name of every other cell -> why, in one sentence.
    """

    table: str
    failures: dict[str, str]

    def raise_failures(self) -> None:
        """Raise StudyError where a cell could not be measured."""
        if self.failures:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
            raise StudyError(
                f"not measured: {reasons}. Mend the cause and run the same command again; finished "
                "cells are kept"
            )


def run_study(
    name: str,
    study: Study,
    model: str,
    out: Path,
    only: list[str],
    say: Callable[[str], None] = print,
    dtype: str = "auto",
) -> StudyResult:
    """Measure the cells of a study; one that fails does not stop the others.

    Args:
        name: name of the study; records go to `out/name`.
        model: what to compress, as for `compress`.
        only: cell names; empty = all. The table then shows these alone, and is not written.
        say: told what happens.
        dtype: dtype the model is compressed and measured in, as for `compress`.

    Raises:
        RecipeError: an unknown cell, or no model.
    """
    known = [cell.name for cell in study.cells]
    for cell in only:
        if cell not in known:
            raise RecipeError(f"study '{name}' has no cell '{cell}'{nearest(cell, known)}")
    if not model:
        raise RecipeError("a study needs a model; add --model with a hub id, folder or .gguf file")
    folder = out / name
    records, failures = [], {}
    for cell in study.cells:
        if only and cell.name not in only:
            continue
        try:
            records.append(run_cell(cell, model, study.protocol, folder, say, dtype))
        except Exception as error:  # hours of other cells must not be lost to a bug in one
            failures[cell.name] = _reason(error)
            say(f"{cell.name}: failed: {failures[cell.name]}")
            if os.environ.get("SUBBIT_DEBUG") == "1":
                say(traceback.format_exc())
    table = markdown(study.title, records, study.beside_published) if records else ""
    if table and not only:
        folder.mkdir(parents=True, exist_ok=True)  # every cell may be another study's
        write_atomic(folder / "table.md", lambda path: path.write_text(table, "utf-8") and None)
        if study.figure:
            try:
                figure = folder / "figure.png"
                write_atomic(figure, lambda path: draw(study.title, records, path))
            except SubbitError as error:
                failures["figure"] = _reason(error)
    return StudyResult(table, failures)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, SubbitError) else f"{type(error).__name__}: {words}"
