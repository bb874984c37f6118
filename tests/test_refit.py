"""Refitting: levels, norms and biases move, codes stay, the block's error falls."""

import copy

import pytest
import torch

from subbit.hub.quantizer import packed_modules
from subbit.refit import loose_tensors
from test_compression import compress, logits
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

REFIT = ["refit.steps=12", "refit.rate=0.02"]


def fitted(family, source, *overrides, recipe="pbs2p-plus-4-8", **kwargs):
    return compress(
        tiny_model(family),
        source,
        recipe,
        tokenizer=tiny_tokenizer(),
        overrides=[*REFIT, *overrides],
        **kwargs,
    )


def refit_lines(done):
    return [line for line in done.log if "refit" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_every_block_falls_and_codes_stay(family, text):
    done = fitted(family, text)
    lines = refit_lines(done)
    assert len(lines) == len({line["name"] for line in lines}) > 1
    assert all(line["refit"]["after"] <= line["refit"]["before"] for line in lines)
    assert any(line["refit"]["after"] < 0.95 * line["refit"]["before"] for line in lines)
    plain = fitted(family, text, "refit.steps=0")
    assert refit_lines(plain) == []
    ours, before = packed_modules(done.model), packed_modules(plain.model)
    first = next(iter(ours))  # of the first block, whose calibration refitting does not change
    assert torch.equal(ours[first].compressed().codes, before[first].compressed().codes)
    assert not torch.equal(ours[first].levels, before[first].levels)
    assert ours[first].levels.dtype == before[first].levels.dtype


@pytest.mark.parametrize("towards", ["original", "block"])
def test_vectors_learn_and_nothing_else_does(towards, text):
    done = fitted("llama", text, f"refit.towards={towards}")
    dense = {name: p for name, p in tiny_model("llama").named_parameters()}
    for name, parameter in done.model.named_parameters():
        if name not in dense:
            continue
        learns = ".layers." in name and parameter.dim() == 1
        assert torch.equal(parameter, dense[name]) != learns, name
        assert not parameter.requires_grad and parameter.grad is None


def test_both_ways_to_reconstruct_differ(text):
    original, block = (
        fitted("llama", text, f"refit.towards={way}") for way in ("original", "block")
    )
    assert not torch.equal(logits(original.model), logits(block.model))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("pbs2p-4-8", []),
        ("pbs2p-plus-4-8", ["levels=int8"]),
        ("pbs2p-4-8", ["levels=int8"]),
        ("gptq-2", []),
        ("arb-rc", []),
        ("pb-llm", []),
        ("wanda-4-8", []),
    ],
)
def test_every_kind_of_result_can_be_refitted_and_saved(recipe, overrides, text, tmp_path):
    from subbit.hub.load import load

    done = fitted("llama", text, *overrides, recipe=recipe, out=tmp_path / "out")
    assert any(line["refit"]["after"] < line["refit"]["before"] for line in refit_lines(done))
    loaded = load(tmp_path / "out", backend="reference")
    assert torch.equal(logits(loaded), logits(done.model))


def test_an_interrupted_refit_resumes_to_the_same_bytes(text, tmp_path, monkeypatch):
    from subbit import compression

    model = tiny_model("gpt2")  # has biases, inside its linears and outside
    whole = compress(copy.deepcopy(model), text, tokenizer=tiny_tokenizer(), overrides=REFIT)
    real, calls = compression.refit_block, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(compression, "refit_block", second_fails)
    out = tmp_path / "out"
    kwargs = {"tokenizer": tiny_tokenizer(), "overrides": REFIT, "out": out}
    with pytest.raises(KeyboardInterrupt):
        compress(copy.deepcopy(model), text, **kwargs)
    monkeypatch.setattr(compression, "refit_block", real)
    resumed = compress(copy.deepcopy(model), text, resume="required", **kwargs)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(refit_lines(resumed)) == len(refit_lines(whole))


def test_a_step_that_makes_it_worse_is_taken_back(text):
    done = fitted("llama", text, "refit.rate=1000")
    plain = fitted("llama", text, "refit.steps=0")
    assert all(line["refit"]["after"] == line["refit"]["before"] for line in refit_lines(done))
    assert torch.equal(logits(done.model), logits(plain.model))


def test_loose_tensors_are_norms_and_biases():
    block = tiny_model("gpt2").transformer.h[0]
    names = set(loose_tensors(block, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]))
    assert {"ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "mlp.c_proj.bias"} <= names
    assert not any(name.endswith("c_attn.weight") for name in names)
