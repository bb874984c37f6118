"""The benchmark on tiny models: what is counted and compared; no time is asserted."""

import gc
import json
import weakref

import pytest
import torch
from packed_models import int8_model, packed_model, packed_names, save
from typer.testing import CliRunner

from subbit.cli import app
from subbit.errors import ModelError, RecipeError
from subbit.evaluate import speed
from subbit.evaluate.bench import PROMPTS, bench, same_tokens
from subbit.hub.load import load
from subbit.packed.kernels import kernel_name
from tiny_models import tiny_model, tiny_tokenizer

SHORT = {"prompt": 9, "new_tokens": 3, "repeats": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(int8_model("llama"), tmp_path_factory.mktemp("bench") / "llama")


@pytest.fixture(scope="module")
def found(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = bench(folder, threads=1, **SHORT)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    return found


def test_every_contender_is_measured(found):
    models = [(model["model"], model["dtype"]) for model in found["models"]]
    kinds = ("packed", "decoded")
    assert models == [(kind, dtype) for kind in kinds for dtype in ("float32", "bfloat16")]
    assert [model["backend"] for model in found["models"][2:]] == ["torch", "torch"]
    for model in found["models"]:
        assert (model["prompt"]["tokens"], model["decode"]["tokens"]) == (9, 3)
        for test in (model["prompt"], model["decode"]):
            assert 0 < test["mean"] <= test["best"] and test["sd"] >= 0
    assert found["threads"] == 1 and found["processor"].endswith("cores")
    json.dumps(found, allow_nan=False)


def test_bytes_and_parameters_are_counted(found, folder):
    wanted = sum(p.numel() for p in tiny_model("llama").parameters())
    assert {model["parameters"] for model in found["models"]} == {wanted}
    packed, half, dense, dense_half = found["models"]
    assert dense["bytes"] - dense_half["bytes"] == 2 * wanted
    embedding = 320 * 64 * 4
    assert dense["token_bytes"] == dense["bytes"] - embedding + 64 * 4  # head of its own
    assert half["bytes"] < packed["bytes"] < dense["bytes"]
    assert packed["bandwidth"] == packed["token_bytes"] * packed["decode"]["best"]
    assert sum(linear["count"] for linear in found["linears"]) == len(packed_names(load(folder)))
    for linear in found["linears"]:
        assert set(linear["ms"]) == {f"{m['model']} {m['dtype']}" for m in found["models"]}


def test_the_same_greedy_tokens_on_twenty_prompts(found):
    assert len(set(PROMPTS)) == 20
    assert found["tokens"] == {"prompts": 20, "same": 20, "new_tokens": 24, "gap": 0.0}


def test_what_no_kernel_takes_is_measured_with_its_dense_weights(tmp_path):
    folder = save(packed_model("llama"), tmp_path / "float16-levels")
    found = bench(folder, threads=1, **SHORT)
    packed, _, dense, _ = found["models"]
    assert packed["backend"] == "torch, dense weights kept"
    assert packed["bytes"] > dense["bytes"]  # the codes are there too
    assert packed["token_bytes"] == dense["token_bytes"]
    for linear in found["linears"]:
        rows, cols = linear["shape"]
        assert linear["bytes"] == 4 * rows * cols  # float32, as the milliseconds beside it


def test_other_tokens_are_noticed(folder):
    one = load(folder, dtype="float32")
    same, gap = same_tokens(one, tiny_model("llama", seed=9).eval(), tiny_tokenizer(), 6)
    assert same < 20 and gap > 0.01


def test_beside_the_original(folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    found = bench(folder, str(tmp_path / "base"), threads=1, **SHORT)
    assert [model["model"] for model in found["models"]][2:] == ["original"] * 2
    assert list(found["linears"][0]["ms"])[::3] == ["packed float32", "original bfloat16"]


@pytest.mark.parametrize(("family", "what"), [("gpt2", "not there"), ("llama-gqa", r"\(32, 64\)")])
def test_an_original_that_is_none_is_refused_at_once(family, what, folder, tmp_path, monkeypatch):
    tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(speed, "decoding", None)
    with pytest.raises(ModelError, match=f"is not the original .* {what}"):
        bench(folder, str(tmp_path / "base"), threads=1, **SHORT)


def test_greedy_is_what_generate_says(folder):
    model = load(folder, dtype="float32")
    tokens = torch.arange(5, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert speed.greedy(model, tokens, 8) == model.generate(tokens, **options)[0, 7:].tolist()


def test_one_model_is_in_memory_at_a_time(folder, monkeypatch):
    from subbit.evaluate import bench as module

    alive = []

    def watched(make):
        def made(*args, **kwargs):
            gc.collect()
            assert [model for model in alive if model() is not None] == []
            model = make(*args, **kwargs)
            alive.append(weakref.ref(model))
            return model

        return made

    monkeypatch.setattr(module, "load", watched(module.load))
    monkeypatch.setattr(module, "_compared", lambda folder: {})
    module.bench(folder, threads=1, **SHORT)
    assert len(alive) == 4


def test_no_more_tokens_than_the_context_holds(folder):
    options = SHORT | {"prompt": 1000, "new_tokens": 1000, "repeats": 1}
    found = bench(folder, threads=1, **options)["models"][0]
    assert found["prompt"]["tokens"] == 256 and found["decode"]["tokens"] == 256 - speed.FIRST


def test_rates():
    rate = speed.Rate.of(10, [1.0, 2.0])
    assert (rate.mean, rate.best) == (7.5, 10.0)
    assert rate.sd == pytest.approx(12.5**0.5)
    assert speed.Rate.of(10, [2.0]) == speed.Rate(5.0, 0.0, 5.0)


def test_reading_bandwidth(monkeypatch):
    found = speed.read_bandwidth(1 << 20, rounds=2)
    assert found is None if kernel_name() == "torch" else found > 0
    monkeypatch.setenv("SUBBIT_KERNEL", "off")
    assert speed.read_bandwidth(1 << 20, rounds=1) is None


@pytest.mark.parametrize("option", ["prompt", "new_tokens", "repeats", "threads"])
def test_nonsense_is_refused(folder, option):
    with pytest.raises(RecipeError, match="at least 1"):
        bench(folder, **{**SHORT, option: 0 if option != "threads" else -1})


def test_the_command(folder, tmp_path):
    short = ["--prompt", "9", "--new-tokens", "3", "--repeats", "1", "--threads", "1"]
    said = CliRunner().invoke(app, ["bench", str(folder), *short])
    assert said.exit_code == 0, said.output
    texts = ("pp9", "tg3", "decoded", "of read", "cores; reading", "after 20 of 20 prompts")
    for text in (*texts, "64 x 64"):
        assert text in said.output
    found = json.loads(CliRunner().invoke(app, ["bench", str(folder), *short, "--json"]).stdout)
    assert len(found["models"]) == 4
    assert CliRunner().invoke(app, ["bench", str(tmp_path)]).exit_code == 3
