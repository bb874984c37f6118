"""Perplexity against the plain loss on the full logits."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subbit.errors import NonFiniteError, RecipeError
from subbit.evaluate import perplexity
from subbit.model import end
from subbit.text import Windows
from tiny_models import tiny_model

module = sys.modules["subbit.evaluate.perplexity"]  # the package's name is the function
FAMILIES = ["llama", "llama-gqa", "gemma2", "opt", "gpt2", "gpt-neox"]


def windows(nsamples=3, seqlen=24, vocab=320) -> Windows:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(vocab, (nsamples, seqlen), generator=generator)
    names = {"source": "here", "role": "evaluation", "origin": "a test", "joiner": "\n"}
    record = {"tokenizer": "tiny", "bos": "none", "sample": "first", "seed": None}
    return Windows(tokens, **names, **record, skip_tokens=0, tokens_available=tokens.numel())


def naive(model, tokens) -> list[float]:
    """Mean NLL of each window from the full logits in float64."""
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double()
    nll = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return nll.mean(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [1, 7, 24])
def test_equals_the_loss_on_full_logits(family, positions, monkeypatch):
    monkeypatch.setattr(end, "_LOGITS_AT_ONCE", positions * 320)
    model, text = tiny_model(family), windows()
    expected = naive(model, text.tokens)
    result = perplexity(model, text)
    assert result.window_nll == pytest.approx(expected, rel=2e-6)
    assert result.nll == pytest.approx(sum(expected) / 3, rel=2e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert (result.tokens, result.windows, result.seqlen) == (3 * 23, 3, 24)


def test_capped_and_scaled_logits_go_through_the_model():
    text = windows()
    assert module._head_is_last(tiny_model("llama"), text.tokens)
    assert module._head_is_last(tiny_model("opt"), text.tokens)
    assert not module._head_is_last(tiny_model("gemma2"), text.tokens)


def test_a_cap_that_bites():
    """With a low cap the head alone would give another loss: the cap must be in the result."""
    model, text = tiny_model("gemma2"), windows()
    model.config.final_logit_softcapping = 0.05
    capped = perplexity(model, text).nll
    assert capped == pytest.approx(sum(naive(model, text.tokens)) / 3, rel=2e-6)
    assert capped == pytest.approx(math.log(320), rel=0.02)
    model.config.final_logit_softcapping = None
    assert abs(perplexity(model, text).nll - capped) > 0.01


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(end, "_LOGITS_AT_ONCE", 5 * 320)
    seen = []
    for family in ("llama", "gemma2"):
        model = tiny_model(family)
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda m, i, out: seen.append(out.shape[-2]))
        perplexity(model, windows())
    # all but the one forward of 16 positions that finds out whether the head comes last
    assert seen.count(16) == 2 and max(n for n in seen if n != 16) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32(dtype):
    model, text = tiny_model("llama").to(dtype), windows()
    assert perplexity(model, text).window_nll == pytest.approx(naive(model, text.tokens), rel=1e-5)


def test_standard_error_by_the_delta_method():
    model, text = tiny_model("llama"), windows(nsamples=6)
    result = perplexity(model, text)
    spread = torch.tensor(naive(model, text.tokens), dtype=torch.float64).std().item()
    assert result.stderr == pytest.approx(result.perplexity * spread / math.sqrt(6), rel=1e-4)
    assert perplexity(model, windows(nsamples=1)).stderr is None


def test_record_is_json_with_the_conditions():
    text, calls = windows(), []
    result = perplexity(tiny_model("llama"), text, advance=calls.append)
    assert calls == [1, 1, 1]
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["perplexity"] == result.perplexity and record["stderr"] == result.stderr
    assert (record["tokens"], record["windows"], record["seqlen"]) == (69, 3, 24)
    assert (record["source"], record["bos"], record["tokenizer"]) == ("here", "none", "tiny")
    assert record["fingerprint"] == text.fingerprint
    endless = module.Perplexity(math.inf, None, 800.0, 1, 1, 2, (800.0,), {})
    assert endless.to_dict()["perplexity"] is None


def test_mode_and_global_rng_stay():
    model = tiny_model("opt").train()
    model.config.dropout = 0.5
    before = torch.random.get_rng_state()
    one, two = perplexity(model, windows()), perplexity(model, windows())
    assert model.training and one.nll == two.nll
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_non_finite_logits_name_the_window(family):
    model, text = tiny_model(family), windows()
    text.tokens[:2].clamp_(max=300)
    text.tokens[2, 9] = 310
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untie
    model.get_input_embeddings().weight[310] = torch.inf
    with pytest.raises(NonFiniteError, match="window 2"):
        perplexity(model, text)


def test_windows_that_do_not_fit():
    with pytest.raises(RecipeError, match="at most 256"):
        perplexity(tiny_model("opt"), windows(1, 300))
    with pytest.raises(RecipeError, match="vocabulary"):
        perplexity(tiny_model("opt"), windows(3, 24, vocab=1000))


@settings(max_examples=20, deadline=None)
@given(nsamples=st.integers(1, 3), seqlen=st.integers(2, 40), positions=st.integers(1, 50))
def test_any_window_and_any_chunk(nsamples, seqlen, positions):
    model, text = tiny_model("llama"), windows(nsamples, seqlen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end, "_LOGITS_AT_ONCE", positions * 320)
        assert perplexity(model, text).window_nll == pytest.approx(
            naive(model, text.tokens), rel=5e-6
        )
