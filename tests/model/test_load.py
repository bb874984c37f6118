"""Models load whole and quietly, and everything else ends in one clear sentence."""

import json
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from subbit.errors import ModelError, RecipeError
from subbit.model import fingerprint, load_model, take_model
from tiny_gguf import write_gguf
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_model("llama-gqa").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def change_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps(config))


def test_a_local_folder_loads_exactly_and_quietly(folder, capfd):
    logging.set_verbosity_warning()
    loaded = load_model(folder)
    assert capfd.readouterr().err == ""
    assert logging.get_verbosity() == logging.WARNING
    list(logging.tqdm(range(2)))  # progress bars are back
    assert "2/2" in capfd.readouterr().err
    assert (loaded.kind, loaded.source) == ("local", str(folder))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert fingerprint(loaded.model) == fingerprint(tiny_model("llama-gqa"))
    assert loaded.tokenizer("the hen")["input_ids"] == tiny_tokenizer()("the hen")["input_ids"]


def test_shards_and_dtypes(sharded):
    assert fingerprint(load_model(str(sharded)).model) == fingerprint(tiny_model("llama"))
    assert load_model(sharded, dtype="bfloat16").model.dtype == torch.bfloat16
    change_config(sharded, dtype="float16")
    assert load_model(sharded).model.dtype == torch.float16
    with pytest.raises(RecipeError, match="unknown dtype 'bflat16'; did you mean 'bfloat16'"):
        load_model(sharded, dtype="bflat16")


def test_what_is_not_there(tmp_path):
    for source in (tmp_path / "nowhere", "./nowhere", "a/b/c", "model.gguf"):
        with pytest.raises(ModelError, match="does not exist"):
            load_model(source)
    with pytest.raises(ModelError, match=r"no config\.json; a folder as save_pretrained"):
        load_model(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give the GGUF file itself: '.*small\.gguf'"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file but no \.gguf"):
        load_model(tmp_path / "model.safetensors")


def test_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json' cannot be read as JSON"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelError, match=r"transformers cannot load .*nonesuch"):
        load_model(folder)


def test_missing_and_damaged_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    whole = first.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"x" * 64, whole + b"!"):
        first.write_bytes(broken)
        with pytest.raises(ModelError, match=rf"{first.name}' \(\d+ bytes\) is truncated"):
            load_model(sharded)
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        load_model(sharded)
    first.unlink()
    with pytest.raises(ModelError, match=rf"{first.name}' is missing"):
        load_model(sharded)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ModelError, match=rf"{first.name}' lacks \d+ tensors that its index lists"):
        load_model(sharded)
    index = sharded / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        load_model(sharded)
    index.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(sharded)


def test_no_weight_is_left_random(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors  # tied: may be absent
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.w"):
        load_model(folder)
    tensors["model.layers.1.mlp.up_proj.weight"] = gone[:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"other shapes for .*: model\.layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_no_weight_of_a_part_of_the_model_is_left_out(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["score.weight"] = torch.ones(2, 4)  # another head
    save_file(tensors, path, {"format": "pt"})
    load_model(folder)
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"no place for: .*layers\.1\.self_attn\.q_proj\.bias"):
        load_model(folder)


def test_models_that_cannot_be_compressed(folder):
    change_config(folder, auto_map=None)
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(folder)
    change_config(folder, auto_map={})
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"already quantised \(method 'gptq'\)"):
        load_model(folder)
    change_config(folder, quantization_config={"quant_method": "subbit"})
    with pytest.raises(ModelError, match="already compressed by subbit"):
        load_model(folder)
    change_config(folder, quantization_config=None, architectures=["LlamaForTokenClassification"])
    with pytest.raises(ModelError, match="LlamaForTokenClassification, which is not a causal LM"):
        load_model(folder)
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ModelError, match="T5ForConditionalGeneration, which is not a causal LM"):
        load_model(folder)
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    with pytest.raises(ModelError, match="needs model code of its own"):
        load_model(folder)


def test_a_model_in_parts_is_refused(folder):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_model("llama")
    assert take_model(model, tiny_tokenizer()).model is model
    add_hook_to_module(model.model.layers[1], ModelHook())
    with pytest.raises(ModelError, match="without device_map"):
        take_model(model, tiny_tokenizer())
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(ModelError, match="on disk"):
        take_model(model, tiny_tokenizer())


def test_a_folder_without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*beside the weights"):
        load_model(folder)


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"hub could not be reached.*\.gguf file works"):
        load_model("nobody/nothing-at-all")


def test_a_hub_model_is_fetched_without_its_other_formats(monkeypatch, sharded):
    asked = []

    def snapshot(hub_id, *, revision, allow_patterns, ignore_patterns):
        asked.append((hub_id, revision, allow_patterns))
        return str(sharded)

    monkeypatch.setattr("subbit.model.files.snapshot_download", snapshot)
    loaded = load_model("owner/name", revision="v1")
    assert (loaded.kind, loaded.source) == ("hub", "owner/name")
    assert fingerprint(loaded.model) == fingerprint(tiny_model("llama"))
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert [patterns for _, _, patterns in asked][1:] == [shards]
    assert {(hub_id, revision) for hub_id, revision, _ in asked} == {("owner/name", "v1")}


def test_a_hub_model_that_is_not_there(monkeypatch):
    def absent(*args, **kwargs):
        response = SimpleNamespace(status_code=404, headers={}, request=None)
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr("subbit.model.files.snapshot_download", absent)
    with pytest.raises(ModelError, match="neither a local folder nor a model on the hub"):
        load_model("owner/name")


def test_a_download_that_breaks_off(monkeypatch):
    def broken(*args, **kwargs):
        raise TimeoutError("read timed out")

    monkeypatch.setattr("subbit.model.files.snapshot_download", broken)
    with pytest.raises(ModelError, match=r"downloading 'owner/name' .*TimeoutError: read timed"):
        load_model("owner/name")


def test_a_gguf_loads_dense_and_quietly(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path)
    loaded = load_model(path, dtype="float32")
    assert capfd.readouterr().err == ""
    assert loaded.kind == "gguf"
    down = loaded.model.model.layers[0].mlp.down_proj
    assert type(down) is torch.nn.Linear
    assert np.array_equal(down.weight.numpy(), written["blk.0.ffn_down"])
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert loaded.tokenizer("the hen")["input_ids"]
    loaded.model.save_pretrained(tmp_path / "dense")
    loaded.tokenizer.save_pretrained(tmp_path / "dense")
    again = load_model(tmp_path / "dense")
    assert fingerprint(again.model) == fingerprint(loaded.model)
    assert load_model(path).model.dtype == torch.bfloat16


def test_a_damaged_gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:20], whole[:3000], whole[:-100], b"JUNK" + whole[4:]):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"tiny\.gguf' \(\d+ bytes\) is truncated or damaged"):
            load_model(path)
