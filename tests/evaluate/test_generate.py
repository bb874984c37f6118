"""Generation and chat on tiny models: the words mean nothing, the rules hold."""

import sys
import warnings

import pytest
import torch

from subbit.errors import NonFiniteError, RecipeError
from subbit.evaluate import chat_loop, generate
from tiny_models import tiny_model, tiny_tokenizer

module = sys.modules["subbit.evaluate.generate"]  # the package's name is the function
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 999  # never drawn: answers have their full length
    return model


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def greedy(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy decoding without a cache, straight from the logits."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_by_default(model, tokenizer):
    expected = greedy(model, tokenizer, "the stairs", 12)
    assert generate(model, tokenizer, "the stairs", max_new_tokens=12) == expected


def test_the_models_own_defaults_do_not_interfere(tokenizer):
    model = tiny_model("llama")
    expected = greedy(model, tokenizer, "on a ring", 8)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3, eos_token_id=999
    )
    model.generation_config.update(no_repeat_ngram_size=1, min_new_tokens=3, min_p=0.9)
    defaults = model.generation_config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, "on a ring", max_new_tokens=8) == expected
    assert model.generation_config is defaults


def test_sampling_is_seeded_and_leaves_the_global_rng(model, tokenizer):
    options = {"max_new_tokens": 16, "temperature": 2.0}
    before = torch.random.get_rng_state()
    one = generate(model, tokenizer, "a", seed=1, **options)
    same = generate(model, tokenizer, "a", seed=1, **options)
    other = generate(model, tokenizer, "a", seed=2, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == same != other
    narrow = generate(model, tokenizer, "a", top_p=1e-6, **options)
    assert narrow == generate(model, tokenizer, "a", max_new_tokens=16)


def test_stream_gives_the_same_text_in_pieces(model, tokenizer):
    pieces: list[str] = []
    options = {"max_new_tokens": 80, "temperature": 5.0, "seed": 1}
    text = generate(model, tokenizer, "the", stream=pieces.append, **options)
    assert len(pieces) > 1 and "" not in pieces
    assert "".join(pieces) == text


def test_answer_ends_at_the_end_of_text_token(tokenizer):
    model = tiny_model("llama")
    first = model(torch.tensor([tokenizer("x")["input_ids"]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [first]
    pieces: list[str] = []
    assert generate(model, tokenizer, "x", stream=pieces.append) == tokenizer.decode([first])


def test_chat_template_when_there_is_one(model, tokenizer, chatty):
    plain = tiny_tokenizer()
    answer = greedy(model, plain, "[u]hi;[a]", 8)
    raw = greedy(model, plain, "hi", 8)
    assert answer != raw
    for prompt, chat, expected in (
        ("hi", "auto", answer),
        ("hi", True, answer),
        ("hi", False, raw),
        ([{"role": "user", "content": "hi"}], "auto", answer),
    ):
        assert generate(model, chatty, prompt, chat=chat, max_new_tokens=8) == expected
    assert generate(model, plain, "hi", max_new_tokens=8) == raw
    with pytest.raises(RecipeError, match="no chat template"):
        generate(model, plain, "hi", chat=True)


def test_prompts_that_cannot_be_continued(model, tokenizer):
    with pytest.raises(RecipeError, match="context"):
        generate(model, tokenizer, "x" * 300)
    last = generate(model, tokenizer, "x" * 250, max_new_tokens=64)
    assert last == generate(model, tokenizer, "x" * 250, max_new_tokens=6)
    assert generate(model, tokenizer, "", max_new_tokens=4)  # from BOS
    tokenizer.bos_token = None
    with pytest.raises(RecipeError, match="empty"):
        generate(model, tokenizer, "")
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"chat": "yes"}):
        with pytest.raises(RecipeError):
            generate(model, tokenizer, "x", **options)


class Talk:
    """A reader of fixed lines that remembers what was written."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.written = list(lines), ""

    def read(self, sign: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, piece: str) -> None:
        self.written += piece


@pytest.fixture
def heard(monkeypatch):
    """The messages of every call of generate that the loop makes; the answers are canned."""
    calls = []

    def fake(model, tokenizer, messages, *, stream, **options):
        calls.append(([dict(message) for message in messages], options))
        if messages[-1]["content"] == "stop":
            stream("half")
            raise KeyboardInterrupt
        if messages[-1]["content"] == "long":
            raise RecipeError("too long")
        stream("an")
        stream(f"swer {len(calls)}")

    monkeypatch.setattr("subbit.evaluate.chat.generate", fake)
    return calls


def contents(call) -> list[str]:
    return [message["content"] for message in call[0]]


def test_chat_keeps_resets_and_ends(model, chatty, heard):
    talk = Talk("hi", "", "and", "/help", "/reset", "new", "/exit", "never")
    chat_loop(model, chatty, read=talk.read, write=talk.write, system="be brief", seed=7)
    assert contents(heard[0]) == ["be brief", "hi"]
    assert contents(heard[1]) == ["be brief", "hi", "answer 1", "and"]
    assert contents(heard[2]) == ["be brief", "new"]
    assert len(heard) == 3 and talk.lines == ["never"]
    assert [options["seed"] for _, options in heard] == [7, 8, 9]
    assert "answer 2\n" in talk.written and talk.written.count("/reset") == 2


def test_chat_survives_a_stopped_and_a_refused_turn(model, chatty, heard):
    talk = Talk("stop", "long", "next")
    chat_loop(model, chatty, read=talk.read, write=talk.write)
    assert contents(heard[2]) == ["stop", "half", "next"]
    assert "half ...\n" in talk.written and "too long\n" in talk.written


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(model, chatty, heard):
    talk = Talk("x" * 100, "y" * 90, "z")
    chat_loop(model, chatty, read=talk.read, write=talk.write, max_new_tokens=64)
    assert [len(call[0]) for call in heard] == [1, 1, 3]
    assert contents(heard[2])[0] == "y" * 90


def test_chat_with_the_model_itself(model, chatty):
    talk = Talk("hi", "more")
    chat_loop(model, chatty, read=talk.read, write=talk.write, max_new_tokens=6)
    first = generate(model, chatty, "hi", max_new_tokens=6)
    turns = [("user", "hi"), ("assistant", first), ("user", "more")]
    messages = [{"role": role, "content": content} for role, content in turns]
    second = generate(model, chatty, messages, max_new_tokens=6)
    assert talk.written.endswith(f"{first}\n{second}\n\n")


def test_chat_needs_a_template(model, tokenizer):
    with pytest.raises(RecipeError, match="no chat template"):
        chat_loop(model, tokenizer, read=Talk().read, write=Talk().write)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_say_nothing_are_refused(tokenizer, temperature, value):
    damaged = tiny_model("llama")
    damaged.lm_head.weight.data[3] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        generate(damaged, tokenizer, "hi", max_new_tokens=2, temperature=temperature)


def test_generation_config_pads_without_a_pad_token(model, tokenizer):
    tokenizer.pad_token = None
    config = module._generation_config(model, tokenizer, 4, 0.0, 1.0)
    assert config.pad_token_id == 999 and not config.do_sample
