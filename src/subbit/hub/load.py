"""Load a packed folder: checksums first, then transformers, then nothing missing."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from subbit.errors import FormatError, ModelError
from subbit.hub.backend import keep_reference, set_backend
from subbit.hub.fetch import local_folder
from subbit.hub.headers import read_folder_headers
from subbit.hub.inspect import is_packed, read_config
from subbit.hub.manifest import MANIFEST, has_manifest, verify_manifest
from subbit.hub.quantizer import register
from subbit.packed.layout import FORMAT_VERSION
from subbit.packed.linear import packed_modules
from subbit.places import parse_device, parse_dtype
from subbit.quiet import quiet_transformers

__all__ = ["is_packed", "load", "load_tokenizer"]


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    keep_dense: bool = False,
    backend: str = "auto",
    planes: int = 2,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a packed model, or raise; it never comes up with weights that are not in the files.

    Args:
        path: a packed folder, or the hub id of one.
        dtype: of the activations and of what is not packed; "auto" = as it was saved.
        device: where to put it; "auto" = the GPU if there is one, else the CPU.
        keep_dense: keep the dense weight of every linear that no kernel takes after its first use:
            fast, but as large in memory as the original.
        backend: "auto", "cpu" or "reference", and
        planes: 2 or 1: see `backend.set_backend`.
        trust_remote_code: run model code that comes with the folder, where transformers has none.

    Raises:
        RecipeError: a dtype, device or backend that is unknown, not there, or does not suit this
            model.
        ModelError: `path` is no packed model, cannot be fetched, or does not fit its config.
        FormatError: a file is damaged, truncated, missing, or of a newer format; the message names
            the file.
    """
    register()
    wanted, place = parse_dtype(dtype), parse_device(device)
    folder = local_folder(path)
    checked = has_manifest(folder)
    if checked:
        verify_manifest(folder, FORMAT_VERSION)
    read_config(folder)
    if not checked:
        warnings.warn(
            f"'{folder}' has no {MANIFEST}, so that damage to its files cannot be told by checksum "
            "(it was re-saved by transformers).",
            stacklevel=2,
        )
        read_folder_headers(folder)
    model = _build(folder, wanted, place, trust_remote_code)
    if not checked:
        _check_contents(model)
    for module in packed_modules(model).values():
        module.keep_dense = keep_dense
    set_backend(model, backend, planes)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved beside a packed model.

    Raises:
        ModelError: no packed folder, or it holds no tokenizer.
    """
    folder = local_folder(path)
    read_config(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{folder}' holds no tokenizer; copy the base model's tokenizer files there or load "
            "the tokenizer from the base model."
        ) from error


def _build(
    folder: Path, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    device_map = None if device.type == "cpu" else {"": device}
    try:
        with quiet_transformers(), keep_reference():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except SafetensorError as error:
        raise FormatError(
            f"the weights in '{folder}' cannot be read ({error}); copy or download them again."
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"'{folder}' needs model code of its own; read it, and if you trust it load the "
                "model with subbit.load(..., trust_remote_code=True)."
            ) from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"'{folder}' cannot be loaded: {reason}") from error
    _refuse_gaps(folder, info)
    return model


def _refuse_gaps(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model of which transformers invented, dropped or reshaped a tensor."""
    for kind in ("missing", "unexpected", "mismatched"):
        keys = info.get(f"{kind}_keys")
        if keys:
            first = min(key[0] if isinstance(key, tuple) else key for key in keys)
            raise FormatError(
                f"{len(keys)} tensors in '{folder}' are {kind}, the first of them '{first}'; "
                "copy or download the folder again."
            )
    for kind in ("error_msgs", "conversion_errors"):
        if info.get(kind):
            raise ModelError(f"'{folder}' cannot be loaded: {info[kind]}")


def _check_contents(model: PreTrainedModel) -> None:
    """Read every packed linear once, so that damaged codes are refused now and not in use."""
    for name, module in packed_modules(model).items():
        try:
            module.compressed()
        except FormatError as error:
            raise FormatError(f"'{name}': {error}") from error
