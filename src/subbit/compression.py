"""The main job: a model and a little text in, the same model with packed linears out.

`compress` settles the recipe, loads the model, refuses what cannot work, and opens the work folder.
Then `Job` (job.py) takes the blocks in order; each is calibrated on the outputs of the blocks that
are already compressed, and committed to disk before the next one begins.
"""

import json
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import subbit
from subbit.binarize import descent
from subbit.errors import ModelError, RecipeError
from subbit.job import Job
from subbit.methods import Settings, make_method
from subbit.model import (
    LoadedModel,
    check_coverage,
    check_finite,
    find_blocks,
    fingerprint,
    load_model,
    take_model,
)
from subbit.model.capture import placed
from subbit.packed.layout import FORMAT_VERSION
from subbit.packed.linear import packed_modules
from subbit.places import parse_device, parse_dtype
from subbit.recipe import Recipe, load_recipe
from subbit.result import CompressedModel
from subbit.run.atomic import json_sha256
from subbit.run.commits import Workdir, check_output
from subbit.run.progress import Progress
from subbit.text import SELF, Text, Windows, calibration_windows, load_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CompressedModel", "compress"]


def compress(
    model: "str | Path | PreTrainedModel",
    recipe: str | Path | Recipe = "pbs2p-6-8",
    calibration: str | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: str | Path | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: str = "auto",
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> CompressedModel:
    """Compress the linears of a causal LM.

    Args:
        model: hub id, local folder, `.gguf` file, or a loaded model (changed in place).
        recipe: name of a shipped recipe, a YAML file, or a `Recipe`.
        calibration: text source (`c4`, `wikitext2`, `ptb`, a file, `stdlib`, `self`) instead of
            the recipe's; likewise `nsamples` and `seqlen`.
        tokenizer: needed when `model` is a loaded model.
        out: folder to write; finished blocks are committed beside it and an interrupted run
            resumes. None keeps everything in memory.
        device: where the work is done: "auto", "cpu", "cuda", "cuda:1"...
        dtype: dtype the model is run in: "auto", "float32", "bfloat16" or "float16".
        resume: "auto", "required" or "never".
        overrides: `key=value` changes to the recipe.
        progress: show a progress bar on stderr.

    Raises:
        SubbitError: anything the user can mend, before hours of work wherever possible.
    """
    recipe = _settle(recipe, calibration, nsamples, seqlen, overrides)
    method = make_method(
        recipe.method,
        recipe.options,
        Settings(recipe.blocksize, recipe.percdamp, recipe.calibration.seed, recipe.levels),
    )
    method.check_nm(recipe.nm)
    if recipe.calibration.outputs == "gradient":
        method.check_outputs()
    if out is not None:
        check_output(Path(out), resume)
    place, wanted = parse_device(device), parse_dtype(dtype)
    source = recipe.calibration.source  # a text that is not there is missed before the model is
    text = None if source == SELF else load_text(source, "calibration")
    if progress and not isinstance(model, nn.Module):
        print(f"loading {model}", file=sys.stderr, flush=True)
    loaded = _load(model, tokenizer, wanted)
    if packed_modules(loaded.model):
        raise ModelError("the model is already compressed by subbit; give the original one")
    check_finite(loaded.model)
    blocks = find_blocks(loaded.model)
    check_coverage(loaded.model, blocks, recipe.skip)
    windows = None if text is None else _windows(recipe, loaded, text)
    with ExitStack() as stack:
        workdir = None
        if out is not None:
            identity = _identity(recipe, loaded, windows, place)
            workdir = stack.enter_context(Workdir.open(Path(out), identity, resume))
        if windows is None:  # it takes long, so that what was sampled is kept in the work folder
            windows = _sampled(recipe, loaded, place, workdir, progress)
        job = Job(loaded, blocks, windows, recipe, method, place, workdir)
        with Progress(job.steps, enabled=progress) as bar:
            result = job.run(bar)
            if workdir is not None:
                bar.phase("writing")
                workdir.publish(result.write)
    return result


def _settle(
    recipe: str | Path | Recipe,
    calibration: str | None,
    nsamples: int | None,
    seqlen: int | None,
    overrides: Sequence[str],
) -> Recipe:
    """Apply everything that the caller changes about the recipe."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = recipe.override(list(overrides))
    given = {"source": calibration, "nsamples": nsamples, "seqlen": seqlen}
    named = [  # as JSON: a path may hold what YAML takes for something else
        f"calibration.{key}={json.dumps(value, ensure_ascii=False, default=str)}"
        for key, value in given.items()
        if value is not None
    ]
    return recipe.override(named)


def _load(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: torch.dtype | str,
) -> LoadedModel:
    if not isinstance(model, nn.Module):
        loaded = load_model(model, dtype=dtype)
        return loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)
    if tokenizer is None:
        raise RecipeError("compress() was given a loaded model without tokenizer; pass tokenizer=")
    return take_model(model, tokenizer, dtype=dtype)


def _windows(recipe: Recipe, loaded: LoadedModel, source: str | Text, **sampling: Any) -> Windows:
    spec = recipe.calibration
    return calibration_windows(
        source,
        loaded.tokenizer,
        loaded.model,
        nsamples=spec.nsamples,
        seqlen=spec.seqlen,
        bos=spec.bos,
        sample=spec.sample,
        seed=spec.seed,
        **sampling,
    )


def _sampled(
    recipe: Recipe,
    loaded: LoadedModel,
    device: torch.device,
    workdir: Workdir | None,
    progress: bool,
) -> Windows:
    """Calibration windows that the model writes itself."""
    spec = recipe.calibration
    with Progress(spec.nsamples * spec.seqlen, enabled=progress) as bar:
        bar.phase("sampling calibration text from the model")
        with placed(loaded.model, device):
            return _windows(recipe, loaded, SELF, shelf=workdir, advance=bar.advance)


def _identity(
    recipe: Recipe, loaded: LoadedModel, windows: Windows | None, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the result; a run resumes only where all of it is the same.

    Text that the model is yet to write (`windows` is None) follows from the rest.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": {
            "source": loaded.source,
            "sha256": fingerprint(loaded.model),
            "config": _digest(loaded.model.config.to_dict()),
            "tokenizer": _digest(loaded.tokenizer.get_vocab()),
        },
        "calibration": SELF if windows is None else windows.to_dict(),
        "dtype": str(loaded.model.dtype),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "descent": "compiled" if descent.is_compiled() else "torch",
        "versions": {
            "subbit": subbit.__version__,
            "format": FORMAT_VERSION,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "safetensors")},
        },
    }


def _digest(facts: dict[str, Any]) -> str:
    """SHA-256 of a config or a vocabulary, without where it came from and what wrote it."""
    facts = {k: v for k, v in facts.items() if k not in ("_name_or_path", "transformers_version")}
    return json_sha256(json.loads(json.dumps(facts, default=str)))
