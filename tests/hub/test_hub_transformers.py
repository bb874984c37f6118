"""What users of transformers do with a packed model: pipelines, devices, compiling, memory."""

import json
import subprocess
import sys

import pytest
import torch
from packed_models import int8_model, logits, packed_model, packed_names, save, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tiny_models
from subbit.errors import FormatError, ModelError
from subbit.hub.backend import set_backend
from subbit.hub.load import load
from subbit.hub.manifest import MANIFEST
from subbit.packed.kernels import kernel_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(int8_model("llama"), tmp_path_factory.mktemp("int8") / "llama")


def backends(model) -> set[str]:
    return {model.get_submodule(name).backend for name in packed_names(model)}


def best() -> str:
    return "reference" if kernel_name() in ("reference", "torch") else "cpu"


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_takes_the_kernel_that_fits(folder, device_map, dtype):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto means the GPU here")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype)
    assert backends(model) == {best()}
    assert model.dtype == dtype and logits(model).dtype == dtype
    wanted = logits(load(folder, backend="reference", dtype="float32"))
    bound = 1e-3 if dtype == torch.float32 else 0.1
    assert (logits(model).float() - wanted).norm() <= bound * wanted.norm()


def test_weights_that_accelerate_moves_stay_as_they_are(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "disk"
    )
    assert backends(model) == {"reference"}
    assert torch.equal(logits(model), logits(load(folder, backend="reference")))


def test_round_trip_through_save_pretrained(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_pipeline(folder, whole):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = folder if whole else load(folder)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    text = write("the ring", **options)[0]["generated_text"]
    ids = torch.tensor([tokenizer("the ring")["input_ids"]])
    said = load(folder, backend="reference").generate(ids, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_compiled_model_says_the_same(folder):
    model = load(folder, backend="cpu", dtype="float32")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens(), use_cache=False).logits
    assert torch.equal(found, model(tokens(), use_cache=False).logits)


def test_dequantize_after_the_kernel_was_chosen(folder):
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    assert torch.equal(logits(dense), logits(load(folder, backend="reference")))


def test_damaged_codes_are_named_when_the_kernel_expands_them(folder, copy_of):
    changed = copy_of(folder)
    model = load(changed, backend="reference")
    name = packed_names(model)[0]
    raw = (changed / "model.safetensors").read_bytes()
    mask = model.get_submodule(name).mask.numpy().tobytes()
    (changed / "model.safetensors").write_bytes(raw.replace(mask, b"\xff" * len(mask)))
    if best() == "cpu":
        with pytest.raises(FormatError, match=f"'{name}'.*mask"):
            AutoModelForCausalLM.from_pretrained(changed)


MEMORY = """
import gc, resource, sys
from subbit.hub.load import load

small, large = sys.argv[1:]
load(small, backend="cpu")
gc.collect()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(large, backend="cpu")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
print(1024 * grown, sum(t.numel() * t.element_size() for t in tensors))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_loading_takes_the_packed_model_and_one_linear(folder, tmp_path, monkeypatch):
    """What a dense model of these linears would take, 65 MB, never comes up."""
    larger = {"hidden_size": 640, "intermediate_size": 1280, "num_hidden_layers": 4}
    monkeypatch.setitem(tiny_models._CONFIGS, "llama", ("llama", tiny_models._LLAMA | larger))
    large = save(int8_model("llama"), tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(large)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown, held = map(int, done.stdout.split())
    file = (large / "model.safetensors").stat().st_size  # mapped, and given back under pressure
    one_dense = 640 * 1280 * 4
    assert grown < held + file + 4 * one_dense


def test_set_backend_still_has_the_last_word(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_backend(model, "reference")
    assert torch.equal(logits(model), logits(load(folder, backend="reference")))


def test_code_that_a_checkpoint_names_and_did_not_need_is_not_named_again(tmp_path):
    model = packed_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "own.Own"}
    folder = save(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_subbit.LlamaForCausalLM"}
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(again), logits(load(folder)))


def test_code_of_a_folder_is_not_run_without_trust(tmp_path, capfd):
    folder = save(packed_model("llama"), tmp_path / "out")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('was run')")
    with pytest.warns(UserWarning, match=MANIFEST), pytest.raises(ModelError, match="trust it"):
        load(folder)
    assert "y/N" not in capfd.readouterr().out  # nobody is asked either


OWN = """
import subbit
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_folder_is_run_where_it_is_trusted(tmp_path):
    folder = save(packed_model("llama"), tmp_path / "out")
    wanted = logits(load(folder))
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN)
    with pytest.warns(UserWarning, match=MANIFEST):
        model = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "Own" and torch.equal(logits(model), wanted)
