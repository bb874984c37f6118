"""Load a causal LM from the hub, a local folder or a GGUF file: whole, dense and checked."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from subbit.errors import ModelError
from subbit.model.checks import check_complete, check_declared, check_kind
from subbit.model.files import check_weights, fetch, looks_like_hub_id, read_json
from subbit.places import parse_device, parse_dtype
from subbit.quiet import quiet_transformers

__all__ = ["LoadedModel", "load_model", "take_model"]

_GGUF_DTYPE = torch.bfloat16
# weights of the wrong shape are reported, not raised: `check_complete` names them
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to be compressed.

    Attributes:
        model: dense, in eval mode, no gradients.
        tokenizer: its tokenizer.
        source: what the user asked for.
        kind: "hub", "local", "gguf" or "memory".
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    kind: str


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal LM with its tokenizer, or say in one sentence why not.

    Args:
        source: a hub id, a local model folder, or a `.gguf` file.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own dtype;
            bfloat16 for GGUF, whose values were quantised far more coarsely than that.
        device: where the model goes: "auto", "cpu", "cuda", "cuda:1"...; None = CPU.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ModelError: the model is absent, damaged, incomplete, already quantised, no causal LM, or
            the hub cannot be reached.
        RecipeError: an unknown dtype, or a device that is unknown or not there.
    """
    wanted = parse_dtype(dtype)
    place = None if device is None else parse_device(device)
    name = str(source)
    path = Path(source).expanduser()
    if path.is_file():
        loaded = _load_gguf(path, name, _GGUF_DTYPE if wanted == "auto" else wanted)
    elif path.is_dir():
        loaded = _load_folder(path, name, "local", wanted, trust_remote_code)
    elif isinstance(source, str) and looks_like_hub_id(source):
        folder = fetch(source, revision)
        loaded = _load_folder(folder, name, "hub", wanted, trust_remote_code)
    else:
        raise ModelError(
            f"'{name}' does not exist; give a model folder, a .gguf file, or a hub id "
            "such as owner/name"
        )
    loaded.model.eval().requires_grad_(False)
    if place is not None:
        loaded.model.to(place)
    return loaded


def take_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | torch.dtype = "auto",
) -> LoadedModel:
    """Take a causal LM that the caller loaded; it is put in eval mode, and needs no gradients.

    Args:
        model: dense and whole, on one device.
        tokenizer: of the model.
        dtype: what its parameters are cast to, in place, as in `load_model`; "auto" = they stay.

    Raises:
        ModelError: parts of the model were left on disk or sent to several devices.
        RecipeError: an unknown dtype.
    """
    wanted = parse_dtype(dtype)
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            "the model was loaded in parts, on several devices or on disk (device_map); load it "
            "without device_map, or give its name or folder: subbit itself runs it block by block"
        )
    if wanted != "auto":
        # not Module.to: buffers such as the frequencies of rotary embeddings stay in float32, as
        # they do where transformers loads a model in that dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, model.config._name_or_path, "memory")


def _load_folder(
    folder: Path, source: str, kind: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> LoadedModel:
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = (
            f"give the GGUF file itself: '{folder / ggufs[0]}'"
            if ggufs and kind == "local"
            else "a folder as save_pretrained writes it is needed"
        )
        raise ModelError(f"'{source}' is no model: it has no config.json; {hint}")
    check_declared(read_json(folder / "config.json"), source, trust_remote_code)
    check_weights(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with _explained(f"'{source}'"), quiet_transformers():
        config = AutoConfig.from_pretrained(folder, **options)
    check_kind(config, source)
    with (
        _explained(f"the tokenizer of '{source}'", "put its files beside the weights"),
        quiet_transformers(),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with _explained(f"'{source}'"), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, **_REPORT, **options
        )
    check_complete(model, info, source)
    return LoadedModel(model, tokenizer, source, kind)


def _load_gguf(path: Path, source: str, dtype: torch.dtype) -> LoadedModel:
    if path.suffix != ".gguf":
        raise ModelError(f"'{source}' is a file but no .gguf; give the folder that holds the model")
    options: dict[str, Any] = {"gguf_file": path.name}
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        # or the weights may stay in their GGUF blocks, where nothing can be compressed
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # the reader's own progress bar knows no off switch
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=dtype, **_REPORT, **options, **dense
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(_gguf_message(path, source, error)) from error
    check_complete(model, info, source)
    # dense from here on: saving and the quantiser checks must not take it for a GGUF model
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LoadedModel(model, tokenizer, source, "gguf")


def _gguf_message(path: Path, source: str, error: Exception) -> str:
    """Say whether the file is broken or transformers cannot use it."""
    try:
        GGUFReader(path)
    except Exception as reason:
        return (
            f"'{source}' ({path.stat().st_size} bytes) is truncated or damaged: no GGUF file can "
            f"be read from it ({_first_line(reason)}); fetch it again"
        )
    return f"transformers cannot turn '{source}' into a causal LM: {_first_line(error)}"


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever transformers raises while loading into one sentence."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        reason = _first_line(error) + (f"; {advice}" if advice else "")
        raise ModelError(f"transformers cannot load {what}: {reason}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0].strip().rstrip(':.')}"
