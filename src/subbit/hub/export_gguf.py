"""`subbit export --gguf`: a GGUF file with exactly the packed weights, or a sentence why not.

Only models of type "llama" with a byte-level BPE tokenizer that llama.cpp has a name for; all
others are refused.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    SpecialVocab,
    TokenType,
    get_tensor_name_map,
)
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from subbit.errors import FormatError, ModelError
from subbit.hub.atomic import save_file_atomically
from subbit.hub.export import DenseTensors, checked_folder
from subbit.hub.gguf_types import lossless
from subbit.packed.pack import unpack

__all__ = ["export_gguf"]

_DENSE = "export it as an ordinary checkpoint with --dense OUT instead"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def export_gguf(path: str | Path, out: str | Path) -> Path:
    """Write a packed model as a GGUF file whose weights are bit for bit those of the packed file.

    Every linear is decoded again by gguf before it is written, and compared. The embedding, the
    head and the norms are stored in the type that they have.

    Args:
        path: a packed folder or the hub id of one.
        out: the file to make; it appears when it is complete.

    Raises:
        ModelError: no packed model, or one that GGUF does not hold without loss; the message says
            what does not fit.
        FormatError: a damaged file.
        OutputError: `out` exists or cannot be written.
    """
    folder = checked_folder(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_architecture(folder, config)
    pre = _pretokenizer(folder)
    tensors = DenseTensors(folder)

    def write(file: Path) -> None:
        # beside the file, where there must be room: the system's own folder may be small, or memory
        with tempfile.TemporaryFile(dir=file.parent) as room:
            writer = GGUFWriter(file, "llama", use_temp_file=True)
            writer.temp_file = room
            _add_architecture(writer, folder, config)
            _add_tokenizer(writer, folder, pre, config.vocab_size)
            _add_tensors(writer, tensors, config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    return save_file_atomically(out, write)


def _check_architecture(folder: Path, config: PretrainedConfig) -> None:
    if config.model_type != "llama":
        raise ModelError(
            f"'{folder}' is a {config.model_type} model, and only llama models are written as "
            f"GGUF; {_DENSE}."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    extra = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if rope.get("rope_type", "default") != "default":
        extra.append(f"rope_type {rope['rope_type']}")
    if config.hidden_act not in ("silu", "swish"):  # a GGUF file has no place to say it
        extra.append(f"hidden_act {config.hidden_act}")
    if extra:
        raise ModelError(f"'{folder}' has {', '.join(extra)}, which is not written yet; {_DENSE}.")


def _pretokenizer(folder: Path) -> str:
    """llama.cpp's name for how the tokenizer splits text.

    Raises:
        ModelError: there is no tokenizer.json, or it splits in a way that has no name here.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"'{folder}' has no tokenizer.json, which a GGUF file needs; {_DENSE}.")
    found = json.loads(file.read_bytes())
    steps = found.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    plain = found.get("normalizer") is None and found["model"]["type"] == "BPE"
    if plain and not any(step.get("add_prefix_space") for step in steps):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == _LLAMA3:
            return "llama-bpe"
    raise ModelError(
        f"the tokenizer of '{folder}' is not one of the byte-level BPE ones whose name in GGUF is "
        f"known here (gpt-2, smollm, llama-bpe); {_DENSE}."
    )


def _add_architecture(writer: GGUFWriter, folder: Path, config: PretrainedConfig) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_name(folder.resolve().name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)


def _add_tokenizer(writer: GGUFWriter, folder: Path, pre: str, vocab_size: int) -> None:
    found = json.loads((folder / "tokenizer.json").read_bytes())
    tokens = {number: token for token, number in found["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in found["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= vocab_size:
        raise ModelError(
            f"the tokenizer of '{folder}' has token {max(tokens)}, the model only {vocab_size}; "
            f"{_DENSE}."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([types.get(i, TokenType.UNUSED) for i in range(vocab_size)])
    SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _add_tensors(writer: GGUFWriter, tensors: DenseTensors, config: PretrainedConfig) -> None:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in tensors.meta:
        data, kind = _encoded(tensors, name)
        linear = name.removesuffix(".weight").rpartition(".")[2]
        if linear in heads:
            data = _interleaved(data, heads[linear])
        writer.add_tensor(_named(names, name), data, raw_dtype=kind)


def _encoded(tensors: DenseTensors, name: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Bytes of a tensor, uint8 `(..., bytes of a row)`, and their type."""
    layout = tensors.layout(name)
    if layout is None:
        return _plain(tensors[name])
    try:
        found = lossless(unpack(layout, tensors.fields(name)))
    except FormatError as error:
        raise FormatError(f"'{name}': {error}") from error
    if found is None:
        raise ModelError(
            f"no GGUF type holds '{name}' without loss: it takes levels that are whole multiples "
            "of one float16 step for each 32 columns (levels: int8 in the recipe, or a grid) in a "
            f"width that 32 divides; {_DENSE}."
        )
    return found[1], found[0]


def _plain(tensor: Tensor) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Vectors as float32, which llama.cpp wants of norms; matrices as they are."""
    if tensor.dim() == 1:
        tensor = tensor.float()
    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.bfloat16: GGMLQuantizationType.BF16,
        torch.float16: GGMLQuantizationType.F16,
    }
    return tensor.contiguous().view(torch.uint8).numpy(), kinds[tensor.dtype]


def _interleaved(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from two halves (transformers' rotary embedding) to pairs (ggml's)."""
    rows = data.shape[0]
    return data.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def _named(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"GGUF has no name for the tensor '{name}'; {_DENSE}.")
    return found
