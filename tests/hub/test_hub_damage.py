"""Damaged, truncated, foreign and future folders are refused, by name, before anything is built."""

import json
import shutil
import struct

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from packed_models import logits, packed_names
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import subbit.hub.load
from subbit.errors import FormatError, ModelError, RecipeError
from subbit.hub import fetch
from subbit.hub.headers import read_header
from subbit.hub.load import is_packed, load, load_tokenizer
from subbit.hub.manifest import MANIFEST, write_manifest
from tiny_models import tiny_model

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
FILES = [  # all but the model card, which is there to be edited
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "modeling_subbit.py",
    "recipe.yaml",
    "subbit.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *SHARDS,
]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail the test if a model is built at all."""

    class Never:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            pytest.fail("a model was built from a damaged folder")

    monkeypatch.setattr(subbit.hub.load, "AutoModelForCausalLM", Never)


def edit_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def rewrite(path, change):
    """Apply `change` to the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_list_of_files_is_complete(sharded):
    assert sorted([*FILES, "README.md"]) == sorted(path.name for path in sharded.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused(name, sharded, copy_of, nothing_runs):
    folder = copy_of(sharded)
    whole = (folder / name).read_bytes()
    last = len(whole) - 1
    for position in sorted({0, 7, 9, min(40, last), last // 2, last - 1, last}):
        for bit in (0, 3, 7):
            spoiled = bytearray(whole)
            spoiled[position] ^= 1 << bit
            (folder / name).write_bytes(spoiled)
            with pytest.raises(FormatError, match=name):
                load(folder)
    (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_missing_and_truncated_files_are_refused(how, name, sharded, copy_of, nothing_runs):
    folder = copy_of(sharded)
    whole = (folder / name).read_bytes()
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[:-5] if how == "truncated" else whole + b"\n")
    expected = "missing" if how == "missing" else f"instead of the {len(whole)}"
    with pytest.raises(FormatError, match=rf"{name}.*{expected}"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"files": 3}'])
def test_a_senseless_manifest_is_refused(content, folders, copy_of, nothing_runs):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(FormatError, match=r"subbit.json is damaged"):
        load(folder)


def test_a_manifest_from_the_future_is_refused(folders, copy_of, nothing_runs):
    folder = copy_of(folders("llama"))
    write_manifest(folder, 99)
    with pytest.raises(FormatError, match=r"version 99.*up to 2; upgrade subbit"):
        load(folder)


@pytest.mark.parametrize("entry", [load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("version", [3, 99, "x", None, True])
def test_a_config_from_the_future_is_refused(version, entry, folders, copy_of):
    folder = copy_of(folders("llama"))
    edit_config(folder, format_version=version)
    write_manifest(folder, 1)
    with pytest.raises(FormatError, match=rf"version {version}.*upgrade subbit"):
        entry(folder)


def test_a_folder_of_the_first_version_loads(folders, copy_of):
    folder = copy_of(folders("llama"))
    edit_config(folder, format_version=1)
    write_manifest(folder, 1)
    assert torch.equal(logits(load(folder)), logits(load(folders("llama"))))


def test_an_intended_edit_is_accepted_with_a_new_manifest(folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / "README.md").write_text("my own words")
    load(folder)  # the card is nobody's business but its author's
    (folder / "recipe.yaml").write_text("# my own words\n")
    with pytest.raises(FormatError, match=r"recipe\.yaml"):
        load(folder)
    write_manifest(folder, 1)
    load(folder)


@pytest.mark.parametrize("entry", [load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("kind", ["missing", "shape", "dtype"])
@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_without_a_manifest_every_packed_tensor_is_checked(kind, entry, folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).unlink()
    key = "model.layers.1.mlp.up_proj.levels"

    def change(tensors):
        levels = tensors.pop(key)
        if kind == "shape":
            tensors[key] = levels[:, :, 1:].contiguous()
        elif kind == "dtype":
            tensors[key] = levels.float()

    rewrite(folder / "model.safetensors", change)
    with pytest.raises(FormatError, match=key):
        entry(folder)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_without_a_manifest_no_other_tensor_is_invented(kind, folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).unlink()

    def change(tensors):
        if kind == "missing":
            del tensors["model.norm.weight"]
        elif kind == "unexpected":
            tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()
        else:
            tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()

    rewrite(folder / "model.safetensors", change)
    with pytest.raises((FormatError, ModelError)):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_without_a_manifest_impossible_codes_are_refused(folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).unlink()
    key = "model.layers.2.mlp.down_proj.mask"
    rewrite(folder / "model.safetensors", lambda tensors: tensors[key].fill_(255))
    with pytest.raises(FormatError, match=r"model.layers.2.mlp.down_proj.*mask"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_without_a_manifest_a_truncated_shard_is_refused(keep, sharded, copy_of):
    folder = copy_of(sharded)
    (folder / MANIFEST).unlink()
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:keep])
    for entry in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=SHARDS[1]):
            entry(folder)


@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_without_a_manifest_a_missing_shard_is_refused(sharded, copy_of):
    folder = copy_of(sharded)
    (folder / MANIFEST).unlink()
    (folder / SHARDS[2]).unlink()
    with pytest.raises(ModelError, match=SHARDS[2]):
        load(folder)


@pytest.mark.parametrize(
    "entry", [{}, {"bias": False}, None, {"rows": 64, "bias": False, "colour": 1}]
)
def test_a_module_that_is_no_layout_is_named(entry, folders, copy_of):
    folder = copy_of(folders("llama"))
    edit_config(folder, modules={"model.layers.0.mlp.up_proj": entry})
    with pytest.raises(FormatError, match=r"model.layers.0.mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("key", ["modules", "recipe", "linears", "calibration"])
def test_a_config_of_other_types_is_refused(key, folders, copy_of):
    folder = copy_of(folders("llama"))
    edit_config(folder, **{key: ["x"]})
    with pytest.raises(FormatError, match=r"config.json holds \['x'\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_module_that_the_model_lacks_is_named(folders, copy_of):
    folder = copy_of(folders("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model.layers.2.* has no such module"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_module_of_another_shape_is_named(folders, copy_of):
    folder = copy_of(folders("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mlp.down_proj.*\(64, 96\).*in_features=128"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_foreign_folders_are_refused_by_name(tmp_path, folders, copy_of):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    other = copy_of(folders("llama"))
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    edit_config(other, quant_method="gptq")
    (other / MANIFEST).unlink()
    for path, what in [
        (tmp_path / "dense", "ordinary"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "nowhere", "not a folder"),
        (other, "gptq"),
    ]:
        for entry in (load, load_tokenizer):
            with pytest.raises(ModelError, match=rf"'{path}'.*{what}"):
                entry(path)
        assert not is_packed(path)


def test_a_config_that_is_no_json_is_refused(folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config.json is not readable JSON"):
        load(folder)
    assert not is_packed(folder)


@pytest.mark.parametrize(("options", "what"), [({"dtype": "int8"}, "int8"), ({"device": "x"}, "x")])
def test_unknown_options_are_named(options, what, folders):
    with pytest.raises(RecipeError, match=f"unknown d.* '{what}'"):
        load(folders("llama"), **options)


def test_what_a_hub_id_is_told_by_its_config(monkeypatch, folders, tmp_path):
    def answer(found):
        def download(hub_id, name):
            if isinstance(found, Exception):
                raise found
            return str(found / name)

        monkeypatch.setattr(fetch, "hf_hub_download", download)
        return fetch.is_packed_on_hub("someone/packed")

    assert answer(folders("llama"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not answer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert answer(tmp_path)  # loading it says what is wrong
    assert not answer(EntryNotFoundError("none"))
    for failure in (LocalEntryNotFoundError("none here"), ConnectionError("no network")):
        with pytest.raises(ModelError, match=r"'someone/packed'.*cannot be reached"):
            answer(failure)  # asking twice would mean waiting twice
    for failure in (OSError(28, "No space left on device"), RuntimeError("read timed out")):
        with pytest.raises(ModelError, match=r"'someone/packed'.*failed \(.*(No space|timed out)"):
            answer(failure)
    assert not fetch.is_packed_on_hub("../somewhere") and not fetch.is_packed_on_hub(str(tmp_path))


def test_a_hub_id_without_network_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'someone/packed'.*cannot be reached"):
        load("someone/packed")


@given(st.binary(max_size=80), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_are_a_header_or_refused(tmp_path_factory, body, length):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(body if length is None else struct.pack("<Q", length) + body)
    with pytest.raises(FormatError, match=r"any.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"a": 1}',
        '{"a": {"dtype": "U8", "shape": [1], "data_offsets": ["x", "y"]}}',
        '{"a": {"dtype": "U8", "shape": ["x"], "data_offsets": [0, 1]}}',
        '{"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}',
        '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}',
    ],
)
def test_senseless_headers_are_refused(text, tmp_path):
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0")
    with pytest.raises(FormatError, match=r"any.safetensors"):
        read_header(path)


def test_the_guard_is_the_first_packed_linear(folders):
    model = load(folders("llama"))
    assert model.config.quantization_config.guard_key.removesuffix(".weight") in packed_names(model)
