"""Calibration text sampled from the model."""

import pytest
import torch

from subbit.errors import NonFiniteError, RecipeError
from subbit.text import calibration_windows, continued_windows, sample_windows
from tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KNOWN = len(TOKENIZER)


def draw(model, tokenizer=TOKENIZER, **options):
    return sample_windows(model, tokenizer, **{"nsamples": 5, "seqlen": 12, "seed": 3, **options})


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt", "gpt2"])
def test_reproducible_from_bos_and_apart_from_the_global_rng(family):
    model = tiny_model(family)
    before = torch.random.get_rng_state()
    one, same, other = draw(model), draw(model), draw(model, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.tokens.shape == (5, 12) and one.tokens.dtype == torch.int64
    assert one.tokens[:, 0].tolist() == [TOKENIZER.bos_token_id] * 5
    assert one.tokens.max() < KNOWN  # the model has more ids than the tokenizer
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len({tuple(row) for row in one.tokens.tolist()}) == 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_top_1_is_greedy_on_the_whole_prefix(family):
    model = tiny_model(family)
    window = draw(model, nsamples=1, top_k=1).tokens
    with torch.no_grad():
        best = model(window).logits[0, :-1, :KNOWN].argmax(-1)
    assert torch.equal(window[0, 1:], best)


def test_tokens_follow_the_model():
    model = tiny_model("llama")
    with torch.no_grad():
        first = model(torch.tensor([[TOKENIZER.bos_token_id]])).logits[0, 0, :KNOWN]
        hot = first.argsort(descending=True)[:20]
    cold = draw(model, nsamples=200, seqlen=2, temperature=0.05).tokens[:, 1]
    assert torch.isin(cold, hot).all()
    among = draw(model, nsamples=200, seqlen=2, top_k=20).tokens[:, 1]
    assert torch.isin(among, hot).all() and len(among.unique()) > 5


def test_without_bos_the_first_token_is_drawn():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    model = tiny_model("gpt2")
    windows = draw(model, tokenizer, nsamples=20)
    starts = windows.tokens[:, 0]
    assert len(starts.unique()) > 10 and windows.bos == "none"
    assert not torch.isin(starts, torch.tensor(tokenizer.all_special_ids)).any()
    assert windows.fingerprint == draw(model, tokenizer, nsamples=20).fingerprint


def test_progress_mode_and_record():
    model = tiny_model("llama").train()
    steps = []
    windows = draw(model, batch_size=2, advance=steps.append)
    assert sum(steps) == 5 * 11 and max(steps) == 2
    assert model.training
    record = windows.to_dict()
    assert (record["source"], record["seed"], record["sample"]) == ("self", 3, "model")
    assert (record["temperature"], record["top_k"], record["batch_size"]) == (1.0, None, 2)


def test_calibration_windows_of_the_model():
    model = tiny_model("llama")
    windows = calibration_windows("self", TOKENIZER, model, nsamples=3, seqlen=8, seed=9)
    assert windows.fingerprint == draw(model, nsamples=3, seqlen=8, seed=9).fingerprint
    for options in ({"skip_tokens": 4}, {"sample": "random"}, {"bos": "document"}):
        with pytest.raises(RecipeError, match="self"):
            calibration_windows("self", TOKENIZER, model, nsamples=3, seqlen=8, **options)


def test_refusals():
    model = tiny_model("llama")
    for options in ({"nsamples": 0}, {"seqlen": 1}, {"temperature": 0}, {"top_k": -1}):
        with pytest.raises(RecipeError):
            draw(model, **options)
    with pytest.raises(RecipeError, match="at most 256"):
        draw(model, seqlen=257)
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="position 1"):
        draw(model)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt", "gpt2"])
def test_pieces_begin_as_the_text_does_and_go_on_as_the_model_would(family, monkeypatch):
    from subbit.text import sample

    monkeypatch.setattr(sample, "_PIECE", 8)
    model, steps = tiny_model(family).train(), []
    text = torch.randint(KNOWN, (3, 20), generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    options = {"nsamples": 4, "seed": 5}
    made = continued_windows(model, TOKENIZER, text, advance=steps.append, **options)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert made.shape == (4, 20) and made.dtype == torch.int64 and made.max() < KNOWN
    # 20 tokens: three pieces of 7, the first token of each is given
    given = text.flatten().tolist()
    assert all(int(token) in given for token in made[:, ::7].flatten())
    assert sum(steps) == 12 * 6
    again = continued_windows(model, TOKENIZER, text, **options)
    other = continued_windows(model, TOKENIZER, text, nsamples=4, seed=6)
    assert torch.equal(made, again) and not torch.equal(made, other)


class Kept(dict):
    """A shelf."""

    fetch, store = dict.get, dict.__setitem__


def test_an_interrupted_text_goes_on_as_it_would_have(monkeypatch):
    from subbit.text import sample

    monkeypatch.setattr(sample, "_PIECE", 8)
    monkeypatch.setattr(sample, "_PIECES_AT_ONCE", 5)
    real, calls, shelf, steps = sample._continue, [], Kept(), []

    def fails_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    text = torch.randint(KNOWN, (3, 20), generator=torch.Generator().manual_seed(1))
    arguments = tiny_model("llama"), TOKENIZER, text
    whole = continued_windows(*arguments, nsamples=4)
    monkeypatch.setattr(sample, "_continue", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        continued_windows(*arguments, nsamples=4, shelf=shelf)
    resumed = continued_windows(*arguments, nsamples=4, shelf=shelf, advance=steps.append)
    assert torch.equal(whole, resumed)
    assert len(calls) == 4 and len(shelf) == 3 and sum(steps) == 12 * 6


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_what_is_given_is_read(family, monkeypatch):
    """With the likeliest token always drawn, a piece is the greedy continuation of its start."""

    def likeliest(shares, count, generator):
        return shares.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    model = tiny_model(family)
    text = torch.randint(KNOWN, (2, 16), generator=torch.Generator().manual_seed(2))
    window = continued_windows(model, TOKENIZER, text, nsamples=1)
    starts = [text[0, i : i + 4].tolist() for i in range(13)]
    assert window[0, :4].tolist() in starts
    with torch.no_grad():
        best = model(window).logits[0, 3:-1, :KNOWN].argmax(-1)
    assert torch.equal(window[0, 4:], best)
