"""Run a study: its cells in order, then its table."""

from collections.abc import Callable
from pathlib import Path

from subbit.errors import RecipeError, nearest
from subbit.study.cells import run_cell
from subbit.study.studies import Study
from subbit.study.tables import markdown

__all__ = ["run_study"]


def run_study(
    name: str,
    study: Study,
    model: str,
    out: Path,
    only: list[str],
    say: Callable[[str], None] = print,
    dtype: str = "auto",
) -> str:
    """Measure the cells of a study and return its table.

    Args:
        name: name of the study; records go to `out/name`.
        model: what to compress, as for `compress`.
        only: cell names; empty = all. The table then shows these alone, and is not written.
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
    records = [
        run_cell(cell, model, study.protocol, folder, say, dtype)
        for cell in study.cells
        if not only or cell.name in only
    ]
    table = markdown(study.title, records)
    if not only:
        (folder / "table.md").write_text(table)
    return table
