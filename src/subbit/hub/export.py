"""`subbit export --dense`: an ordinary checkpoint, for tools that know nothing of packed files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from subbit.errors import FormatError, ModelError
from subbit.hub.atomic import save_atomically
from subbit.hub.config import SubbitConfig
from subbit.hub.fetch import local_folder
from subbit.hub.headers import TensorInfo, read_folder_headers
from subbit.hub.inspect import read_config
from subbit.hub.manifest import MANIFEST, has_manifest, verify_manifest
from subbit.packed.layout import FORMAT_VERSION
from subbit.packed.pack import AnyLayout, decode_dense
from subbit.places import parse_dtype
from subbit.quiet import quiet_transformers

__all__ = ["DenseTensors", "checked_folder", "export_dense"]

# What a packed folder has and an ordinary one does not, or has of its own.
_OURS = {MANIFEST, "README.md", "recipe.yaml", "modeling_subbit.py", "compression.jsonl"}
_OURS |= {"config.json", "model.safetensors.index.json"}


def checked_folder(path: str | Path) -> Path:
    """The folder of a packed model, fetched if need be, its checksums verified where it has them.

    Raises:
        ModelError: no packed model, or it cannot be fetched.
        FormatError: a file is damaged, truncated or missing, or of a newer format.
    """
    folder = local_folder(path)
    read_config(folder)
    if has_manifest(folder):
        verify_manifest(folder, FORMAT_VERSION)
    return folder


class DenseTensors:
    """The tensors of a packed folder as those of the dense model, each made when it is asked for.

    Args:
        folder: a checked packed folder.
        dtype: of all floating tensors; None = as they are, and linears in the model's dtype.

    Attributes:
        dtype: of the linears.
        meta: name -> tensor of the right shape and dtype on the meta device.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.folder = folder
        self._wanted = dtype
        config = read_config(folder)
        self._layouts = {f"{name}.weight": lay for name, (lay, _) in config.layouts().items()}
        self._stored = _stored_tensors(folder)
        self._check(config)
        packed = {
            f"{name}.{field}"
            for name, (lay, _) in config.layouts().items()
            for field in lay.fields()
        }
        skeleton = _skeleton(folder)
        self.dtype = dtype or skeleton.dtype
        self._transposed = {
            name
            for name in self._layouts
            if isinstance(skeleton.get_submodule(name.removesuffix(".weight")), Conv1D)
        }
        names = [n for n in self._stored if n not in packed and n not in self._layouts]
        self.meta = {name: self._plain_meta(name) for name in names}
        self.meta |= {name: self._linear_meta(name) for name in self._layouts}

    def _check(self, config: SubbitConfig) -> None:
        for name, (layout, _) in config.layouts().items():
            for field in layout.fields():
                if f"{name}.{field}" not in self._stored:
                    raise FormatError(
                        f"the tensor '{name}.{field}' is missing from {self.folder}; copy or "
                        "download the folder again."
                    )

    def _plain_meta(self, name: str) -> Tensor:
        with safe_open(self._stored[name].file, framework="pt") as file:
            scalar = not self._stored[name].shape
            dtype = (file.get_tensor(name) if scalar else file.get_slice(name)[:0]).dtype
        keep = self._wanted is None or not dtype.is_floating_point
        return torch.empty(
            self._stored[name].shape, dtype=dtype if keep else self._wanted, device="meta"
        )

    def _linear_meta(self, name: str) -> Tensor:
        layout = self._layouts[name]
        shape = (layout.rows, layout.cols)
        shape = shape[::-1] if name in self._transposed else shape
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def layout(self, name: str) -> AnyLayout | None:
        """How the tensor is packed; None if it is not."""
        return self._layouts.get(name)

    def fields(self, name: str) -> dict[str, Tensor]:
        """The packed tensors of a linear's weight."""
        linear = name.removesuffix(".weight")
        return {f: self._read(f"{linear}.{f}") for f in self._layouts[name].fields()}

    def __getitem__(self, name: str) -> Tensor:
        """The dense tensor; FormatError if packed bytes mean none."""
        layout = self._layouts.get(name)
        if layout is None:
            return self._read(name).to(self.meta[name].dtype)
        try:
            weight = decode_dense(layout, self.fields(name), self.dtype)
        except FormatError as error:
            raise FormatError(f"'{name}': {error}") from error
        return weight.T.contiguous() if name in self._transposed else weight

    def _read(self, name: str) -> Tensor:
        with safe_open(self._stored[name].file, framework="pt") as file:
            return file.get_tensor(name)


def export_dense(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "1GB",
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Write a packed model as an ordinary checkpoint: config, safetensors, tokenizer.

    What comes out is what the reference decode means, rounded to `dtype` as a forward pass in it
    would. Shards are made one after the other: memory holds one of them.

    Args:
        path: a packed folder or the hub id of one.
        out: the folder to make; it appears when it is complete.
        dtype: "auto" = the model's own, or "float32", "bfloat16", "float16".
        max_shard_size: of one safetensors file.
        advance: called with the number of tensors of a shard that is written.

    Raises:
        RecipeError: an unknown dtype.
        ModelError: no packed model, or one of a kind that transformers does not know.
        FormatError: a damaged file; the message names it or the linear.
        OutputError: `out` exists or cannot be written.
    """
    wanted = parse_dtype(dtype)
    folder = checked_folder(path)
    tensors = DenseTensors(folder, None if wanted == "auto" else wanted)
    plan = split_torch_state_dict_into_shards(tensors.meta, max_shard_size=max_shard_size)

    def build(work: Path) -> None:
        _write_json(work / "config.json", _plain_config(folder, tensors.dtype))
        for file, names in plan.filename_to_tensors.items():
            shard = {name: tensors[name] for name in names}
            save_file(shard, work / file, metadata={"format": "pt"})
            # written private, unlike everything else
            (work / file).chmod((work / "config.json").stat().st_mode)
            if advance is not None:
                advance(len(names))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(work / "model.safetensors.index.json", index)
        for file in _other_files(folder):
            (work / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file, work / file)

    return save_atomically(out, build)


def _stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    stored: dict[str, TensorInfo] = {}
    for header in read_folder_headers(folder):
        stored |= header.tensors
    return stored


def _skeleton(folder: Path) -> nn.Module:
    """The dense model on the meta device: it tells nn.Linear from Conv1D, and its dtype."""
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            del config.quantization_config
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, AttributeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"'{folder}' cannot be built as a dense model: {reason}") from error


def _plain_config(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    del config["quantization_config"]
    auto_map = config.get("auto_map") or {}
    if any("modeling_subbit." in str(target) for target in auto_map.values()):
        del config["auto_map"]
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _other_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, chat templates, generation config and the like, relative to the folder."""
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        foreign = file.name.startswith(".") or file.suffix == ".safetensors"
        if file.is_file() and not foreign and file.name not in _OURS:
            yield file.relative_to(folder)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
