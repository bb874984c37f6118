"""A packed model that was saved and loaded is the model that was saved, in every way of loading."""

import json

import pytest
import torch
from packed_models import logits, packed_model, packed_names, record, save, tokens
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

import subbit
from subbit.errors import ModelError
from subbit.hub.load import is_packed, load, load_tokenizer
from subbit.hub.save import save_packed
from subbit.packed import FORMAT_VERSION
from tiny_models import tiny_tokenizer

FAMILIES = ["llama", "llama-gqa", "opt", "gpt2", "gemma", "phi3", "gpt-neox"]


def stored(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal_after_loading(family, folders):
    expected = logits(packed_model(family))
    assert torch.equal(logits(load(folders(family))), expected)
    plain = AutoModelForCausalLM.from_pretrained(folders(family))
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_saves_it_again(family, folders, tmp_path):
    load(folders(family)).save_pretrained(tmp_path / "again")
    assert is_packed(tmp_path / "again")
    with pytest.warns(UserWarning, match="has no subbit.json"):
        again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(packed_model(family)))
    assert set(stored(tmp_path / "again")) == set(stored(folders(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dense_weight_of_a_packed_linear_is_stored(family, folders):
    model = packed_model(family)
    tensors = stored(folders(family))
    names = packed_names(model)
    assert len(names) >= 12
    weights = [name for name in names if f"{name}.weight" in tensors]
    assert len(weights) == 1, "one guard tensor and no more"
    assert tensors[f"{weights[0]}.weight"].tolist() == [FORMAT_VERSION]
    for name in names:
        own = {key for key in tensors if key.startswith(f"{name}.")} - {f"{name}.weight"}
        fields = set(model.get_submodule(name).fields())
        assert {key.removeprefix(f"{name}.") for key in own} - {"bias"} == fields


def test_tied_embeddings_stay_tied_and_are_stored_once(folders):
    tensors = stored(folders("llama-gqa"))
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    model = load(folders("llama-gqa"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_another_dtype_leaves_codes_and_levels_as_stored(dtype, folders):
    model = load(folders("opt"), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    linear = model.get_submodule(packed_names(model)[0])
    tensors = stored(folders("opt"))
    for field, value in linear.fields().items():
        assert torch.equal(value, tensors[f"{packed_names(model)[0]}.{field}"])
    assert linear.levels.dtype == torch.float16
    assert linear.bias.dtype == wanted
    assert logits(model).dtype == wanted


def test_a_model_saved_in_bfloat16_comes_back_in_bfloat16(tmp_path):
    model = packed_model("opt", dtype=torch.bfloat16)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_generate_gives_the_same_tokens(folders):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = packed_model("llama").generate(tokens(), **options)
    assert torch.equal(load(folders("llama")).generate(tokens(), **options), expected)


def test_a_device_map_with_a_part_on_disk_works(folders, tmp_path):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    places |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        folders("llama"), device_map=places, offload_folder=tmp_path
    )
    assert torch.equal(logits(model), logits(packed_model("llama")))


def test_nothing_is_trainable_and_nothing_is_left_on_meta(folders):
    model = load(folders("gpt2"))
    for name in packed_names(model):
        for parameter in model.get_submodule(name).parameters():
            assert not parameter.requires_grad and not parameter.is_meta
    assert not model.training


def test_keep_dense_reaches_every_packed_linear(folders):
    names = packed_names(load(folders("llama")))
    kept, lean = (load(folders("llama"), keep_dense=keep) for keep in (True, False))
    assert all(kept.get_submodule(name).keep_dense for name in names)
    assert not any(lean.get_submodule(name).keep_dense for name in names)
    assert torch.equal(logits(kept), logits(lean))


def test_shards_hold_the_same_model(sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(sharded)), logits(packed_model("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_model_without_its_head_loads_too(family, folders):
    model = packed_model(family)
    bare = AutoModel.from_pretrained(folders(family))
    with torch.no_grad():
        expected = model.base_model(tokens()).last_hidden_state
        assert torch.equal(bare(tokens()).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_dequantize_gives_an_ordinary_model(family, folders, tmp_path):
    model = load(folders(family)).dequantize()
    assert not packed_names(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert not is_packed(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense), logits(packed_model(family)))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    first, second = (save(packed_model("opt"), tmp_path / name / "m") for name in "ab")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in (first / name).read_bytes(), name


def test_the_tokenizer_and_the_facts_come_along(folders):
    tokenizer = load_tokenizer(folders("llama"))
    assert tokenizer("the ring")["input_ids"] == tiny_tokenizer()("the ring")["input_ids"]
    config = load(folders("llama")).config.quantization_config
    assert config.recipe["nm"] == "6:8" and config.base_model == "someone/tiny"
    assert config.linears["model.layers.0.self_attn.q_proj"] == record(0)
    assert "nm: '6:8'" in (folders("llama") / "recipe.yaml").read_text()


def test_a_local_base_model_is_not_named_by_its_path(tmp_path):
    options = {"recipe": {}, "calibration": {}, "records": {}, "base_model": str(tmp_path / "base")}
    save_packed(packed_model("llama"), None, tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["base_model"] == "base"
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "out")


def test_a_model_without_packed_linears_is_not_saved(tmp_path, folders):
    model = load(folders("llama")).dequantize()
    with pytest.raises(ModelError, match="no packed linear"):
        save_packed(model, None, tmp_path, recipe={}, calibration={}, records={})


def test_subbit_load_is_this_load():
    assert subbit.load is load
