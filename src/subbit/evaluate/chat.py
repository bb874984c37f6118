"""A conversation with a model in the terminal."""

import sys
from collections.abc import Callable

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

    When the conversation outgrows the model's context, its oldest turns are forgotten.

    Args:
        model: causal LM.
        tokenizer: of the model, with a chat template.
        read: called with the prompt sign, returns a line; raises EOFError at the end.
        write: called with each piece of text; no newline is added.
        system: system message before the first turn.
        max_new_tokens, temperature, top_p: as in `generate`.
        seed: of the first turn; each turn has the next one.

    Raises:
        RecipeError: no chat template, or a single turn longer than the model's context.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            "the tokenizer has no chat template, so this model takes no conversation; use generate "
            "with a text to continue"
        )
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = []
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
            continue
        if not line:
            continue
        if line.startswith("/"):
            write(_HELP)
            continue
        turns.append({"role": "user", "content": line})
        turns = _recent(model, tokenizer, start, turns, max_new_tokens)
        answer: list[str] = []

        def say(piece: str, answer: list[str] = answer) -> None:
            answer.append(piece)
            write(piece)

        try:
            generate(
                model,
                tokenizer,
                start + turns,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stream=say,
            )
        except KeyboardInterrupt:
            write(" ...")
        write("\n")
        seed += 1
        turns.append({"role": "assistant", "content": "".join(answer)})


def _recent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: list[Message],
    turns: list[Message],
    max_new_tokens: int,
) -> list[Message]:
    """Drop the oldest question and answer until the rest and a new answer fit the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return turns
    while len(turns) > 1:
        length = prompt_tokens(tokenizer, start + turns).shape[1]
        if length + max_new_tokens <= context:
            break
        turns = turns[2:]
    return turns
