"""Write a packed model into a folder: the same model gives the same bytes, every time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import ModelError
from subbit.hub.card import model_card
from subbit.hub.config import SubbitConfig
from subbit.hub.inspect import inspect_folder
from subbit.hub.manifest import write_manifest
from subbit.hub.quantizer import attach
from subbit.packed.linear import packed_modules
from subbit.quiet import quiet_transformers
from subbit.recipe import recipe_yaml

__all__ = ["save_packed"]

_MODELING = '''\
"""Opens this folder through `trust_remote_code=True`; it needs `pip install subbit`."""

from transformers import {name} as _Dense

import subbit  # noqa: F401  (teaches transformers the packed format)


class {name}(_Dense):
    """The model of transformers itself; its packed linears come from subbit."""
'''


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    recipe: dict[str, Any],
    calibration: dict[str, Any],
    records: dict[str, dict[str, Any]],
    base_model: str | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a model that holds `PackedLinear` modules as a packed folder.

    Afterwards the model's config says what it is, so that its own `save_pretrained` works too. The
    facts are written as given: leave out times and other things that differ from run to run.

    Args:
        model: the compressed model.
        tokenizer: saved beside the weights; None for a model without one.
        out: the folder to fill (`atomic.save_atomically` makes it appear at once).
        recipe: the recipe as plain JSON.
        calibration: where the calibration tokens came from, and their fingerprint.
        records: dotted name of each packed linear -> facts about its fit.
        base_model: name of the model that was compressed; of a local path the last part is kept.
        max_shard_size: size from which the weights are split into several files.

    Raises:
        ModelError: the model holds no packed linear.
    """
    recipe = _public_recipe(recipe)
    packed = packed_modules(model)
    if not packed:
        raise ModelError("the model holds no packed linear; compress it before saving it.")
    modules = {
        name: module.layout.to_dict() | {"bias": module.bias is not None}
        for name, module in packed.items()
    }
    config = SubbitConfig(
        modules=modules,
        recipe=recipe,
        calibration=calibration,
        linears={name: records[name] for name in modules if name in records},
        embeddings=_embedding_tensors(model),
        base_model=_public_name(base_model),
    )
    attach(model, config)
    # the file's names are the modules' names, also where transformers has older ones for them
    with quiet_transformers(), _valid_generation_config(model):
        model.save_pretrained(out, max_shard_size=max_shard_size, save_original_format=False)
    for shard in out.glob("*.safetensors"):  # written private, unlike everything else
        shard.chmod((out / "config.json").stat().st_mode)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    remote_code = _write_modeling(model, out)
    (out / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    facts = inspect_folder(out) | {"recipe": recipe, "calibration": calibration}
    card = model_card(facts, remote_code=remote_code)
    (out / "README.md").write_text(card, encoding="utf-8")
    write_manifest(out, config.format_version)


@contextmanager
def _valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Mend what transformers loads but refuses to save, such as a temperature without sampling."""
    before = model.generation_config
    try:
        if before is not None and not _is_valid(before):
            mended = GenerationConfig(**before.to_diff_dict() | {"do_sample": True})
            ids = ("bos_token_id", "eos_token_id", "pad_token_id")
            bare = GenerationConfig(**{key: getattr(before, key) for key in ids})
            model.generation_config = mended if _is_valid(mended) else bare
        yield
    finally:
        model.generation_config = before


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _public_name(base_model: str | None) -> str | None:
    """A hub id as it is, a path of this machine by its last part only."""
    if base_model is None:
        return None
    path = PurePath(base_model)
    local = path.is_absolute() or len(path.parts) != 2 or Path(base_model).exists()
    return path.name if local else base_model


def _public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a calibration file's name in the place of its path on this machine."""
    calibration = dict(recipe.get("calibration") or {})
    if isinstance(calibration.get("source"), str):
        calibration["source"] = PurePath(calibration["source"]).name
    return recipe | {"calibration": calibration} if calibration else recipe


def _embedding_tensors(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that embed tokens or positions or map back to the vocabulary."""
    head = model.get_output_embeddings()
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def _write_modeling(model: PreTrainedModel, out: Path) -> bool:
    """Make the folder open through `trust_remote_code=True`; False for a model of foreign code.

    Where transformers has the class itself, an `auto_map` of the checkpoint gives way: the code it
    names was not run and is not in the folder.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        return False
    (out / "modeling_subbit.py").write_text(_MODELING.format(name=name), encoding="utf-8")
    config = _read_json(out / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": f"modeling_subbit.{name}"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    return True


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
