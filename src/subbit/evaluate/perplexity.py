"""Token perplexity over windows, as in GPTQ and the papers after it.

Two things are otherwise. They tokenise with the tokenizer's defaults, so that the text of a LLaMA
model begins with one BOS and all windows lie one token further; here no special token is added
unless `make_windows` is told where (`bos`). And of C4 they join the first 1100 documents of the
validation file with blanks and take 256 windows (early code: 256 random cuts of long documents);
here the same documents are joined with line breaks, and all windows count unless told otherwise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subbit.errors import NonFiniteError
from subbit.model import positions_at_once
from subbit.text.sample import evaluating
from subbit.text.windows import Windows, check_windows

__all__ = ["Perplexity", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """A token perplexity with everything that it depends on.

    Attributes:
        perplexity: exp(nll); inf where that overflows.
        stderr: standard error of the perplexity; None for a single window.
        nll: mean negative log-likelihood, in nats, over all predicted tokens.
        tokens: predicted tokens, windows x (seqlen - 1).
        windows: number of windows.
        seqlen: context length: tokens a window.
        window_nll: mean negative log-likelihood of each window.
        text: provenance of the windows, `Windows.to_dict`.
    """

    perplexity: float
    stderr: float | None
    nll: float
    tokens: int
    windows: int
    seqlen: int
    window_nll: tuple[float, ...]
    text: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but `window_nll`, JSON-able; a perplexity of inf becomes None."""
        finite = math.isfinite(self.perplexity)
        provenance = {k: v for k, v in self.text.items() if k not in ("nsamples", "seqlen")}
        return {
            "perplexity": self.perplexity if finite else None,
            "stderr": self.stderr,
            "nll": self.nll,
            "tokens": self.tokens,
            "windows": self.windows,
            "seqlen": self.seqlen,
            **provenance,
        }


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Windows, *, advance: Callable[[int], None] | None = None
) -> Perplexity:
    """Return exp of the mean NLL over the seqlen - 1 predictions of every window.

    The standard error treats the windows as independent draws: with s the standard deviation of
    their n mean NLLs (n - 1 in its denominator), the mean NLL has the standard error s / sqrt(n),
    and by the delta method the perplexity has perplexity * s / sqrt(n).

    Log-probabilities are taken in float32 from the model's own logits, some positions at a time:
    memory beyond the model's activations stays at a few hundred MB for any vocabulary.

    Args:
        model: causal LM, on any device and in any dtype.
        windows: int64 tokens `(nsamples, seqlen)`.
        advance: called with 1 after each window.

    Raises:
        RecipeError: the windows do not fit the model (`check_windows`).
        NonFiniteError: logits are not finite; the message names the window.
    """
    check_windows(windows, model.config)
    means = []
    with evaluating(model):
        logits_of = _logits_by_head if _head_is_last(model, windows.tokens) else _logits_by_segment
        for index, window in enumerate(windows.tokens):
            means.append(_mean_nll(logits_of(model, window.to(model.device)), window, index))
            if advance is not None:
                advance(1)
    nll = math.fsum(means) / len(means)
    value = math.exp(nll) if nll < 700 else math.inf  # exp overflows at 709.8
    stderr = None
    if len(means) > 1 and math.isfinite(value):
        spread = torch.tensor(means, dtype=torch.float64).std().item()
        stderr = value * spread / math.sqrt(len(means))
    count = len(means) * (windows.seqlen - 1)
    return Perplexity(
        value, stderr, nll, count, len(means), windows.seqlen, tuple(means), windows.to_dict()
    )


def _mean_nll(chunks: Iterator[Tensor], window: Tensor, index: int) -> float:
    """Return the mean NLL of `window` `(seqlen,)` given its logits in chunks `(positions, V)`."""
    total, done = 0.0, 0
    for logits in chunks:
        targets = window[done + 1 : done + 1 + logits.shape[0]].to(logits.device)
        predictions = logits[: targets.shape[0]]  # the last position predicts nothing
        loss = torch.nn.functional.cross_entropy(predictions.float(), targets, reduction="sum")
        total += loss.item()
        if not math.isfinite(total):  # a NaN or Inf among the logits of a position is in its loss
            raise NonFiniteError(
                f"the model's logits are not finite in window {index}; check its weights, or load "
                "it in float32 or bfloat16"
            )
        done += logits.shape[0]
    return total / (window.shape[0] - 1)


def _head_is_last(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the logits are the output embedding of the last hidden state and nothing more.

    Some models cap or scale their logits after the head. Rather than list them, compare both ways
    bit for bit on the start of the first window.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        return False
    start = tokens[0, :16].to(model.device)
    logits = model(input_ids=start[None], use_cache=False).logits[0]
    return torch.equal(torch.cat(list(_logits_by_head(model, start))), logits)


def _logits_by_head(model: PreTrainedModel, window: Tensor) -> Iterator[Tensor]:
    """Run the body of the model once and its head on chunks of positions."""
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0]
    for chunk in hidden.split(_positions_at_once(model)):
        yield head(chunk)


def _logits_by_segment(model: PreTrainedModel, window: Tensor) -> Iterator[Tensor]:
    """Run the whole model on one segment of the window after the other, through its cache."""
    cache = None
    for segment in window.split(_positions_at_once(model)):
        output = model(input_ids=segment[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits[0]


def _positions_at_once(model: PreTrainedModel) -> int:
    return positions_at_once(model.config.get_text_config().vocab_size)
