"""Text from a model: greedy by default, sampled with a seed of its own, streamed if wanted."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from subbit.errors import NonFiniteError, RecipeError
from subbit.text.sample import evaluating

__all__ = ["Message", "generate", "prompt_tokens"]

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | str = "auto",
    stream: Callable[[str], object] | None = None,
) -> str:
    """Return what the model says after `prompt`, without the prompt and without special tokens.

    Args:
        model: causal LM, on any device.
        tokenizer: of the model.
        prompt: a text, or the messages of a conversation (then the chat template is used).
        max_new_tokens: longest answer; a shorter one if the model's context ends before.
        temperature: 0 = greedy; else sampling from the logits divided by it.
        top_p: sample from the smallest set of tokens that holds this much probability.
        seed: of the sampling; the caller's random state is the same before and after.
        chat: whether a text becomes one turn of the chat template: True, False, or "auto" = if
            the tokenizer has a template.
        stream: called with each piece of text as soon as it is complete.

    Raises:
        RecipeError: an option that means nothing, an empty prompt, one that leaves no room in the
            context, or chat without a chat template.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}; they "
            "must be at least 1, at least 0, and in (0, 1]"
        )
    tokens = prompt_tokens(tokenizer, prompt, chat)
    room = _room(model, tokens)
    config = _generation_config(model, tokenizer, min(max_new_tokens, room), temperature, top_p)
    tokens = tokens.to(model.device)
    streamer = None if stream is None else _Pieces(tokenizer, stream)
    with evaluating(model), _without_defaults(model), _seeded(seed if temperature > 0 else None):
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
            streamer=streamer,
        )
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], chat: bool | str = "auto"
) -> Tensor:
    """Return the tokens that `generate` starts from, int64 `(1, length)` on the CPU.

    Raises:
        RecipeError: chat without a chat template, a `chat` of another kind, or an empty prompt.
    """
    if chat not in (True, False, "auto"):
        raise RecipeError(f"chat is '{chat}'; it must be true, false or 'auto'")
    has_template = bool(tokenizer.chat_template)
    if isinstance(prompt, str) and (chat is True or (chat == "auto" and has_template)):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    elif has_template:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        ids = ids["input_ids"]
    else:
        raise RecipeError(
            "the tokenizer has no chat template, so this model takes no conversation; give it a "
            "text to continue and leave chat off"
        )
    if not ids:
        raise RecipeError("the prompt is empty and the tokenizer has no BOS token; give some text")
    return torch.tensor([ids])


def _room(model: PreTrainedModel, tokens: Tensor) -> int:
    """Return how many tokens fit into the context behind the prompt."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return 1 << 31
    if tokens.shape[1] >= context:
        raise RecipeError(
            f"the prompt has {tokens.shape[1]} tokens but the model's context only {context}; "
            "shorten it"
        )
    return context - tokens.shape[1]


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    """All that is asked for; what is not named here is off (see `_without_defaults`)."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **sampling,
    )


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own defaults, which may sample, penalise repetition, or ban tokens.

    `model.generate` fills what a generation config leaves open from those.
    """
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed the global generators and put back their states; do nothing for None.

    `model.generate` draws from the global generators and takes no other.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class _Finite(LogitsProcessor):
    """Refuse logits that say nothing; greedy decoding would take the first token in silence."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not math.isfinite(scores.max().item()):  # NaN wherever one is
            raise NonFiniteError(
                "the model's logits are not finite; its weights are damaged, or it needs another "
                "dtype (--dtype float32)"
            )
        return scores


class _Pieces(TextStreamer):
    """Hand each finished piece of the answer to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.stream(text)
