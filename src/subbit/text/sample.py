"""Calibration text sampled from the model itself: nothing to download, the model's own language."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import NonFiniteError, RecipeError
from subbit.text.sources import SELF
from subbit.text.windows import Windows, check_windows, tokenizer_name

__all__ = ["Shelf", "continued_windows", "evaluating", "sample_windows"]

_PIECE = 512  # tokens at most before the model starts on another piece: it drifts from its subject
_GIVEN = 4  # a piece begins with a quarter that it is given
_PIECES_AT_ONCE = 64


class Shelf(Protocol):
    """Keeps what was finished for a run that goes on later, as a `Workdir` does."""

    def fetch(self, name: str) -> Any:
        """Return what is kept under `name`, or None."""

    def store(self, name: str, value: Any) -> None:
        """Keep a JSON-able value under `name`."""


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    batch_size: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    shelf: Shelf | None = None,
    advance: Callable[[int], None] | None = None,
) -> Windows:
    """Sample windows from the model, each from BOS on, past any end-of-text token.

    Without a BOS every window starts with a token drawn uniformly from the vocabulary. All draws
    come from one own generator on the CPU: the same arguments give the same windows, and the
    global RNG is neither read nor moved.

    Args:
        model: causal LM, on any device.
        tokenizer: of the model.
        nsamples: number of windows.
        seqlen: tokens a window, the first one included.
        seed: seed of the generator.
        batch_size: windows sampled at once; it is part of what determines the text.
        temperature: divides the logits; above 0.
        top_k: draw from the k most likely tokens only; None = from all.
        shelf: keeps every batch once it is sampled; with those that it has from an interrupted call
            with the same arguments the result is the same.
        advance: called with the number of new tokens after each step.

    Raises:
        RecipeError: an option that means nothing, or seqlen beyond the model's context.
        NonFiniteError: the model's logits are not finite.
    """
    for name, value in (("nsamples", nsamples), ("batch_size", batch_size), ("top_k", top_k or 1)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; it must be at least 1")
    if seqlen < 2 or temperature <= 0:
        raise RecipeError(
            f"seqlen is {seqlen} and temperature {temperature}; sampling needs at least 2 tokens "
            "a window and a temperature above 0"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = _starts(tokenizer, nsamples, generator)
    windows = Windows(
        tokens=starts.expand(nsamples, seqlen).contiguous(),
        source=SELF,
        role="calibration",
        origin="sampled from the model",
        joiner="",
        tokenizer=tokenizer_name(tokenizer),
        bos="none" if tokenizer.bos_token_id is None else "window",
        sample="model",
        seed=seed,
        skip_tokens=0,
        tokens_available=nsamples * seqlen,
        sampling={"temperature": temperature, "top_k": top_k, "batch_size": batch_size},
    )
    check_windows(windows, model.config)
    known = _known(tokenizer)
    with evaluating(model):
        for number, part in enumerate(windows.tokens.split(batch_size)):
            name = f"sampled-{number}"
            if not _fetch(shelf, name, part, generator, advance):
                _continue(model, part, known, temperature, top_k, generator, advance)
                _store(shelf, name, part, generator)
    return windows


@torch.no_grad()
def continued_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    *,
    nsamples: int,
    seed: int = 0,
    shelf: Shelf | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Windows of pieces that begin as a text does and go on as the model would.

    A window is made of pieces of up to 512 tokens; the first quarter of each is cut out of one of
    the given windows, the rest is drawn from what the model predicts. All draws come from one own
    generator on the CPU.

    Args:
        model: causal LM, on any device.
        tokenizer: of the model.
        tokens: the text, int64 `(windows, seqlen)`; every window is used as often as any other.
        nsamples: number of windows to make.
        seed: seed of the generator.
        shelf: keeps every 64 pieces once they are written; with those that it has from an
            interrupted call with the same arguments the result is the same.
        advance: called with the number of new tokens after each step.

    Returns:
        int64 `(nsamples, seqlen)`.

    Raises:
        NonFiniteError: the model's logits are not finite.
    """
    seqlen = tokens.shape[1]
    count = -(-seqlen // _PIECE)
    length = -(-seqlen // count)
    given = max(1, length // _GIVEN)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(nsamples * count) % len(tokens)
    starts = torch.randint(seqlen - given + 1, (len(rows), 1), generator=generator)
    pieces = tokens.new_empty(len(rows), length)
    pieces[:, :given] = tokens[rows[:, None], starts + torch.arange(given)]
    known = _known(tokenizer)
    with evaluating(model):
        for number, part in enumerate(pieces.split(_PIECES_AT_ONCE)):
            name = f"written-{number}"
            if not _fetch(shelf, name, part, generator, advance, given):
                _continue(model, part, known, 1.0, None, generator, advance, given)
                _store(shelf, name, part, generator)
    return pieces.view(nsamples, count * length)[:, :seqlen].contiguous()


def _fetch(
    shelf: Shelf | None,
    name: str,
    part: Tensor,
    generator: torch.Generator,
    advance: Callable[[int], None] | None,
    given: int = 1,
) -> bool:
    """Fill `part` `(batch, seqlen)` with what is kept; False, with nothing changed, if none is."""
    kept = None if shelf is None else shelf.fetch(name)
    if kept is None:
        return False
    part.copy_(torch.tensor(kept["tokens"]))
    generator.set_state(torch.tensor(kept["generator"], dtype=torch.uint8))
    if advance is not None:
        advance(part[:, given:].numel())
    return True


def _store(shelf: Shelf | None, name: str, part: Tensor, generator: torch.Generator) -> None:
    if shelf is not None:
        state = generator.get_state().tolist()
        shelf.store(name, {"tokens": part.tolist(), "generator": state})


def _known(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids have a token; a padded vocabulary has rows without one."""
    return max(tokenizer.get_vocab().values()) + 1


def _starts(
    tokenizer: PreTrainedTokenizerBase, nsamples: int, generator: torch.Generator
) -> Tensor:
    """Return the first token of every window, int64 `(nsamples, 1)`."""
    if tokenizer.bos_token_id is not None:
        return torch.full((nsamples, 1), tokenizer.bos_token_id)
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return torch.tensor(words)[torch.randint(len(words), (nsamples, 1), generator=generator)]


def _continue(
    model: PreTrainedModel,
    tokens: Tensor,
    known: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    advance: Callable[[int], None] | None,
    given: int = 1,
) -> None:
    """Fill `tokens` `(batch, seqlen)` in place from column `given` on."""
    cache = None
    if given > 1:  # without the head, whose logits of all these tokens would be large
        begin = tokens[:, : given - 1].to(model.device)
        cache = model.base_model(input_ids=begin, use_cache=True).past_key_values
    for position in range(given, tokens.shape[1]):
        step = tokens[:, position - 1 : position].to(model.device)
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :known].float().cpu() / temperature
        if not logits.isfinite().all():
            raise NonFiniteError(
                f"the model's logits are not finite at position {position} of its own text; check "
                "its weights, or load it in float32"
            )
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens[:, position] = drawn[:, 0]
        if advance is not None:
            advance(tokens.shape[0])


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` into eval mode (no dropout) and give it back in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
