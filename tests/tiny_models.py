"""Tiny randomly initialised models of every family that subbit must handle, and a tokenizer.

Three layers, hidden size 64, a vocabulary of 320 shared with `tiny_tokenizer`. Everything is made
from transformers' own configs: nothing is downloaded and the global RNG is left as it was.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["FAMILIES", "REFUSED", "VOCAB_SIZE", "tiny_model", "tiny_tokenizer"]

VOCAB_SIZE = 320
HIDDEN = 64
LAYERS = 3

_COMMON = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
_GEMMA = _LLAMA | {"head_dim": 16}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_MOE = {"num_experts_per_tok": 2, "head_dim": 16}

# family -> (transformers model type, config values)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA | {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 6}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA | _MIXED | {"sliding_window": 6}),
    "gemma3": ("gemma3_text", _GEMMA | _MIXED | {"sliding_window": 6}),
    "phi3": ("phi3", _LLAMA),
    "opt": (
        "opt",
        _COMMON
        | {
            "hidden_size": HIDDEN,
            "ffn_dim": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": HIDDEN,
            "init_std": 0.08,
        },
    ),
    "gpt-neox": (
        "gpt_neox",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "gpt2": (
        "gpt2",
        _COMMON
        | {
            "n_embd": HIDDEN,
            "n_inner": 96,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.08,
        },
    ),
    # refused: weights outside the linears of the decoder blocks
    "mixtral": ("mixtral", _LLAMA | _MOE | {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", _LLAMA | _MOE | {"num_experts": 4, "moe_intermediate_size": 32}),
}
_CONFIGS["opt-projected"] = ("opt", _CONFIGS["opt"][1] | {"word_embed_proj_dim": 32})

REFUSED = ["mixtral", "qwen3-moe", "opt-projected"]
FAMILIES = [family for family in _CONFIGS if family not in REFUSED]


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a float32 causal LM of `family` in eval mode on the CPU, the same for the same seed.

    Norm weights and biases are random too: with ones and zeros a forgotten one would go unseen.
    """
    model_type, values = _CONFIGS[family]
    config = CONFIG_MAPPING[model_type](**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: 3 special tokens, 256 bytes, a few merges; any text fits.

    `<pad>` = 0, `<s>` = 1, `</s>` = 2, as in the configs of `tiny_model`; fewer ids than
    `VOCAB_SIZE`.
    """
    words = [" t", " a", "he", "in", "re", "on", " the", "er", " s", "at", "ing", " o", "ed"]
    pieces = [word.replace(" ", "Ġ") for word in words]
    merges: list[tuple[str, str]] = []
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>"])}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    for piece in pieces:
        tail = next(p for p in (piece[1:], piece[2:]) if p in vocab)
        head = piece[: -len(tail)]
        merges.append((head, tail))
        vocab[piece] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
