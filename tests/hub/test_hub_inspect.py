"""What `inspect_folder` and the model card say is what the files hold."""

import json

import pytest
import torch
from packed_models import RECIPE, packed_model, packed_names, record, save

from subbit.errors import FormatError
from subbit.hub.card import model_card
from subbit.hub.config import SubbitConfig
from subbit.hub.headers import read_folder_headers
from subbit.hub.inspect import inspect_folder

FAMILIES = ["llama", "llama-gqa", "opt", "gpt2", "gpt-neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_add_up_to_the_files(family, folders):
    total = inspect_folder(folders(family))["total"]
    size = sum(path.stat().st_size for path in folders(family).glob("*.safetensors"))
    assert total["linear_bytes"] + total["other_bytes"] + total["header_bytes"] == size
    assert total["file_bytes"] == size


def test_the_bytes_of_shards_add_up_too(sharded):
    total = inspect_folder(sharded)["total"]
    size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert total["linear_bytes"] + total["other_bytes"] + total["header_bytes"] == size


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_are_those_of_the_model(family, folders):
    model = packed_model(family)
    total = inspect_folder(folders(family))["total"]
    linears = [model.get_submodule(name) for name in packed_names(model)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    own = {id(field) for linear in linears for field in linear.fields().values()}
    dense = [p for p in model.parameters() if id(p) not in own]  # a tied weight comes once
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    positions = {"opt": (256 + 2) * 64, "gpt2": 256 * 64}.get(family, 0)
    embeddings = embedding.numel() + (0 if head is embedding else head.numel()) + positions
    assert total["weights"] == weights
    assert total["parameters"] == weights + sum(p.numel() for p in dense)
    assert total["embedding_parameters"] == embeddings
    assert total["embedding_bytes"] == 4 * embeddings
    assert total["file_bits_per_parameter"] == 8 * total["file_bytes"] / total["parameters"]
    rest = total["file_bytes"] - 4 * embeddings
    bits = 8 * rest / (total["parameters"] - embeddings)
    assert total["file_bits_without_embeddings"] == pytest.approx(bits)


def test_every_linear_is_told_with_its_real_bits(folders):
    model = packed_model("llama")
    facts = inspect_folder(folders("llama"))
    names = packed_names(model)
    assert sorted(linear["name"] for linear in facts["linears"]) == sorted(names)
    for linear in facts["linears"]:
        module = model.get_submodule(linear["name"])
        nbytes = sum(field.nbytes for field in module.fields().values())
        assert linear["bytes"] == nbytes
        assert linear["stored_bits"] == 8 * nbytes / module.compressed().codes.numel()
        assert linear["shape"] == [module.out_features, module.in_features]
        assert linear["nm"] == [6, 8]
        assert linear["loss"] == record(names.index(linear["name"]))["loss"]
        assert linear["paper_bits"] == 0.8 and linear["damping"] == 0.01
        share = module.compressed().salient.float().mean().item()
        assert linear["salient_share"] == pytest.approx(share)
    assert facts["total"]["stored_bits"] == pytest.approx(
        8 * facts["total"]["linear_bytes"] / facts["total"]["weights"]
    )
    assert facts["total"]["paper_bits"] == pytest.approx(0.8)


def test_paper_bits_are_counted_where_no_record_tells_them(folders, copy_of):
    folder = copy_of(folders("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linears"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    for linear in inspect_folder(folder)["linears"]:
        assert linear["loss"] is None
        assert linear["paper_bits"] == pytest.approx((1 + linear["salient_share"]) * 6 / 8)


def test_layers_come_in_the_order_of_their_numbers():
    names = [f"model.layers.{i}.q" for i in (10, 2, 0, 1)]
    assert list(SubbitConfig(modules={name: {} for name in names}).modules) == [
        f"model.layers.{i}.q" for i in (0, 1, 2, 10)
    ]


def test_it_is_plain_json(folders):
    facts = inspect_folder(folders("llama"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["format_version"] == 2 and facts["recipe"]["name"] == "pbs2p-6-8"
    assert facts["calibration"]["source"] == "stdlib"


def test_headers_tell_the_tensors(folders):
    (header,) = read_folder_headers(folders("llama"))
    info = header.tensors["model.norm.weight"]
    assert (info.dtype, info.shape, info.nbytes, info.numel) == ("F32", (64,), 256, 64)


def test_a_folder_without_weights_is_refused(folders, copy_of):
    folder = copy_of(folders("llama"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"holds no .safetensors file"):
        inspect_folder(folder)


def test_the_card_tells_both_bit_widths_and_how_to_load(folders):
    facts = inspect_folder(folders("llama"))
    card = (folders("llama") / "README.md").read_text()
    total = facts["total"]
    for value in ("paper_bits", "stored_bits", "file_bits_without_embeddings"):
        assert f"{total[value]:.3f}" in card
    assert "import subbit" in card and "trust_remote_code=True" in card
    assert "base_model: someone/tiny" in card and "| nm | 6:8 |" in card
    assert "trust_remote_code" not in model_card(facts, remote_code=False)
    assert "base_model:" not in model_card(facts | {"base_model": "a b\nx: y"}, remote_code=False)


def test_inspecting_builds_no_model(folders, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *a, **k: pytest.fail("built a module"))
    inspect_folder(folders("llama"))


def test_the_card_of_a_tuned_model_says_so(folders):
    facts = inspect_folder(folders("llama"))
    recipe = facts["recipe"]
    assert "not trained: embeddings, norms" in model_card(facts, remote_code=True)
    for tuned in ({"steps": 9}, {"steps": 0, "model_steps": 9}):
        card = model_card(facts | {"recipe": recipe | {"refit": tuned}}, remote_code=True)
        assert "tuned by gradients" in card and "not trained" not in card


def test_the_path_of_a_calibration_file_stays_at_home(tmp_path):
    calibration = RECIPE["calibration"] | {"source": str(tmp_path / "prose.txt")}
    folder = save(packed_model("llama"), tmp_path / "out", RECIPE | {"calibration": calibration})
    assert inspect_folder(folder)["recipe"]["calibration"]["source"] == "prose.txt"
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
