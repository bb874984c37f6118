"""A cell of a study: one model, one recipe, compressed, written, loaded again and measured."""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from subbit.compression import compress
from subbit.errors import CalibrationError, CheckpointError
from subbit.evaluate.perplexity import perplexity
from subbit.hub.inspect import inspect_folder
from subbit.hub.load import load, load_tokenizer
from subbit.model.load import load_model
from subbit.recipe import Recipe, load_recipe
from subbit.run.atomic import file_sha256
from subbit.run.memory import reset_peak_rss
from subbit.text import load_text, make_windows

__all__ = ["Cell", "Protocol", "run_cell"]

_MEASURED = {"wikitext2": "evaluation", "c4": "calibration"}  # text -> its role; c4 held out


@dataclass(frozen=True)
class Protocol:
    """How every cell of a study is calibrated and measured.

    Attributes:
        calibration: text source.
        nsamples, seqlen: calibration windows.
        windows: evaluation windows of `seqlen` tokens a data set, the first ones.
        c4_from: C4 is measured on the calibration stream from this token on (held out), as in
            the reference figures; must lie behind the calibration windows.
    """

    calibration: str = "c4"
    nsamples: int = 32
    seqlen: int = 2048
    windows: int = 40
    c4_from: int = 200_000


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
        name: file name of the cell's record.
        recipe: recipe name, or None for the original model.
        overrides: changes to the recipe, as on the command line; they go before the protocol.
    """

    name: str
    recipe: str | None
    overrides: list[str] = field(default_factory=list)


def run_cell(
    cell: Cell,
    model: str,
    protocol: Protocol,
    folder: Path,
    say: Callable[[str], None] = print,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Return the cell's record, from `folder` or a folder beside it where it is there already.

    A cell is the same under any name in any study: same hub id or local weights, same text, whole
    recipe and protocol.
    The packed model is written to disk, inspected, loaded from there, measured, and removed; an
    interrupted compression resumes.

    Args:
        model: what to compress, as for `compress`.
        folder: where the records of the study are kept; beside it are those of other studies.
        say: told what happens.
        dtype: dtype the model is compressed and measured in, as for `compress`. Recorded and shown,
            but not compared: a cell that was measured in another dtype is not measured again.
    """
    record_path = folder / f"{cell.name}.json"
    recipe = _recipe(cell, protocol)
    settings = {
        "model": Path(model).name if Path(model).exists() else model,
        "weights_sha256": _weights_digest(model),
        "texts": _text_digests(protocol),
        "cell": asdict(cell),
        "protocol": asdict(protocol),
        "recipe_sha256": _digest(recipe),
    }
    known = _measured(settings, folder)
    if known is not None:
        path, record = known
        say(f"{cell.name}: already measured" + _elsewhere(path, record_path))
        return record | {"cell": settings["cell"]}
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{cell.name}: {cell.recipe or 'original'} {' '.join(cell.overrides)}")
    reset_peak_rss()  # or a cell would report what an earlier one took
    record = settings | {"environment": _environment()}
    if recipe is None:
        loaded = load_model(model, dtype=dtype)
        network, tokenizer = loaded.model, loaded.tokenizer
    else:
        packed = folder / f"{cell.name}.model"
        _compress(recipe, model, packed, settings, dtype, say)
        record["run"] = _run_report(packed)
        facts = inspect_folder(packed)
        record |= {"total": facts["total"], "calibration": facts["calibration"]}
        network, tokenizer = _load(packed, dtype), load_tokenizer(packed)
    record["vocabulary"] = network.config.vocab_size
    record["dtype"] = str(network.dtype).removeprefix("torch.")
    for name in _MEASURED:
        begun = time.monotonic()
        record[name] = _measure(name, network, tokenizer, protocol)
        record[name]["seconds"] = round(time.monotonic() - begun, 1)
        value = record[name]["perplexity"]
        say(f"{cell.name}: {name} {math.inf if value is None else value:.2f}")
    record_path.with_suffix(".tmp").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(record_path.with_suffix(".tmp"), record_path)
    if cell.recipe is not None:
        shutil.rmtree(packed)
        _note_of(packed).unlink()
    return record


def _recipe(cell: Cell, protocol: Protocol) -> Recipe | None:
    """The whole recipe of a cell; None for the original model."""
    if cell.recipe is None:
        return None
    calibration = [
        f"calibration.source={protocol.calibration}",
        f"calibration.nsamples={protocol.nsamples}",
        f"calibration.seqlen={protocol.seqlen}",
    ]
    return load_recipe(cell.recipe).override([*calibration, *cell.overrides])


@cache
def _weights_digest(model: str) -> str | None:
    """Of the weight files of a folder, or of a file; None for a hub id."""
    path = Path(model)
    names = ("*.safetensors", "*.bin")
    files = sorted(f for n in names for f in path.glob(n)) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        return None
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _text_digests(protocol: Protocol) -> dict[str, str | None]:
    """Of every text that a cell is calibrated on or measured with."""
    texts = {*_MEASURED.items(), (protocol.calibration, "calibration")}
    return {" ".join(text): _text_digest(*text) for text in sorted(texts)}


@cache
def _text_digest(name: str, role: str) -> str | None:
    """Of one text; None where it cannot be loaded now, or is written by the model itself."""
    try:
        return hashlib.sha256(load_text(name, role).joined.encode()).hexdigest()
    except CalibrationError:
        return None


def _digest(recipe: Recipe | None) -> str | None:
    """Of what a recipe says beside the defaults, so that a new setting makes no record old."""
    if recipe is None:
        return None
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    if not recipe.asymmetry.strength:
        said.pop("asymmetry", None)  # how something is done that is not done
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _compress(
    recipe: Recipe,
    model: str,
    packed: Path,
    settings: dict[str, Any],
    dtype: str,
    say: Callable[[str], None],
) -> None:
    """Make the packed folder, unless one of the very same cell was left there by a cut-off run."""
    wanted = settings | {"dtype": dtype, "subbit": version("subbit")}
    note = _note_of(packed)
    if packed.exists():
        if note.exists() and note.read_text() == json.dumps(wanted):
            return
        shutil.rmtree(packed)
    note.write_text(json.dumps(wanted))
    try:
        compress(model, recipe, out=packed, dtype=dtype)
    except CheckpointError as error:  # cut off with other versions or threads
        say(f"starting over: {error}")
        compress(model, recipe, out=packed, dtype=dtype, resume="never")


def _note_of(packed: Path) -> Path:
    """Where it says beside a packed folder what it is; no record, so not by their suffix."""
    return packed.with_suffix(".model.note")


def _load(packed: Path, dtype: str) -> torch.nn.Module:
    """The packed model as any machine computes it: decoded, no kernel of this one."""
    return load(packed, dtype=dtype, keep_dense=True, backend="reference")


def _measured(settings: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The record of the same cell and where it is, first of this study, then of the others."""
    others = sorted(path for path in folder.parent.glob("*/*.json") if path.parent != folder)
    own = folder / f"{settings['cell']['name']}.json"
    for path in [own, *sorted(set(folder.glob("*.json")) - {own}), *others]:
        try:
            record = json.loads(path.read_text())
            if _same(record, settings):
                return path, record
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or no record of a cell
    return None


def _same(record: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a record is of the cell with these settings, whatever the two are called.

    Old records say nothing of weights or texts, or of the whole recipe.
    """
    if any(record[key] != settings[key] for key in ("model", "protocol")):
        return False
    if record.get("weights_sha256", settings["weights_sha256"]) != settings["weights_sha256"]:
        return False
    texts = record.get("texts", {})
    if any(digest not in (None, texts.get(t, digest)) for t, digest in settings["texts"].items()):
        return False
    if "recipe_sha256" in record:
        return record["recipe_sha256"] == settings["recipe_sha256"]
    cells = record["cell"], settings["cell"]
    was, now = ((cell["recipe"], sorted(cell["overrides"])) for cell in cells)
    return was == now


def _elsewhere(path: Path, own: Path) -> str:
    if path == own:
        return ""
    return f" as {path.stem}" if path.parent == own.parent else f" in {path.parent.name}"


def _measure(name: str, network: Any, tokenizer: Any, protocol: Protocol) -> dict[str, Any]:
    windows = make_windows(
        load_text(name, _MEASURED[name]),
        tokenizer,
        nsamples=protocol.windows,
        seqlen=protocol.seqlen,
        skip_tokens=protocol.c4_from if name == "c4" else 0,
    )
    return perplexity(network, windows).to_dict()


def _run_report(packed: Path) -> dict[str, Any]:
    return json.loads((packed / "compression.jsonl").read_text().splitlines()[-1])["run"]


def _environment() -> dict[str, Any]:
    packages = ("subbit", "torch", "transformers", "safetensors")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages},
    }
