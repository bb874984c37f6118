"""A conversation with a model in the terminal."""

import sys
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import RecipeError
from subbit.evaluate.generate import Message, generate, prompt_tokens

__all__ = ["chat_loop"]

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer\n"


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def chat_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] = _write,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk until `/exit` or the end of the input; the model sees the whole conversation.

    When the conversation outgrows the model's context, its oldest turns are forgotten; a single
    turn that is too long is refused and the conversation goes on.

    Args:
        model: causal LM.
        tokenizer: of the model, with a chat template.
        read: called with the prompt sign, returns a line; raises EOFError at the end.
        write: called with each piece of text; no newline is added.
        system: system message before the first turn.
        max_new_tokens, temperature, top_p: as in `generate`.
        seed: of the first turn; each turn has the next one.

    Raises:
        RecipeError: no chat template.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            "the tokenizer has no chat template, so this model takes no conversation; use generate "
            "with a text to continue"
        )
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = []
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    write(_HELP)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/exit":
            return
        if line == "/reset":
            turns = []
        elif line.startswith("/"):
            write(_HELP)
        elif line:
            question = {"role": "user", "content": line}
            heard = _recent(model, tokenizer, start, [*turns, question], max_new_tokens)
            try:
                said = _answer(model, tokenizer, start + heard, write, {**options, "seed": seed})
                turns = [*heard, {"role": "assistant", "content": said}]
            except RecipeError as error:  # this turn is too long; the earlier ones are still good
                write(f"{error}\n")
            seed += 1


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    write: Callable[[str], object],
    options: dict[str, Any],
) -> str:
    """Write the answer piece by piece and return it; Ctrl-C keeps what was said until then."""
    said: list[str] = []

    def say(piece: str) -> None:
        said.append(piece)
        write(piece)

    try:
        generate(model, tokenizer, messages, stream=say, **options)
    except KeyboardInterrupt:
        write(" ...")
    write("\n")
    return "".join(said)


def _recent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: list[Message],
    turns: list[Message],
    max_new_tokens: int,
) -> list[Message]:
    """Drop the oldest question and answer until the context has room for a new answer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return turns
    room = context - min(max_new_tokens, context // 2)
    while len(turns) > 1 and prompt_tokens(tokenizer, start + turns).shape[1] > room:
        turns = turns[2:]
    return turns
