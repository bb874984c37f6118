"""An ordinary checkpoint from a packed folder: to transformers what the reference means."""

import json
import subprocess
import sys

import pytest
import torch
from packed_models import int8_model, logits, packed_model, packed_names, save, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from subbit.cli import app
from subbit.errors import FormatError, ModelError, OutputError, RecipeError
from subbit.hub import export
from subbit.hub.export import export_dense
from subbit.hub.inspect import is_packed
from subbit.hub.load import load
from subbit.hub.manifest import MANIFEST
from tiny_models import tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_logits_are_those_of_the_reference(family, dtype, tmp_path):
    folder = save(packed_model(family), tmp_path / "packed")
    out = export_dense(folder, tmp_path / "dense", dtype=dtype)
    reference = load(folder, dtype="float32" if dtype == "auto" else dtype, backend="reference")
    dense = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(dense[1][kind] for kind in ("missing_keys", "unexpected_keys"))
    assert dense[0].dtype == reference.dtype
    assert torch.equal(logits(dense[0]), logits(reference))


def test_shards_and_tied_embeddings(sharded, tmp_path):
    out = export_dense(sharded, tmp_path / "dense", max_shard_size="50KB")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(load(sharded)))
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1


def test_scalars_and_chat_templates_come_along(folders, copy_of, tmp_path):
    folder = copy_of(folders("llama"))
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"scale": torch.tensor(1.5)}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    out = export_dense(folder, tmp_path / "dense", dtype="bfloat16")
    found = load_file(out / "model.safetensors")["scale"]
    assert found.shape == () and found.dtype == torch.bfloat16 and found == 1.5
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"


def test_nothing_of_ours_is_left(folders, tmp_path):
    out = export_dense(folders("llama"), tmp_path / "dense")
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not is_packed(out) and "subbit" not in (out / "config.json").read_text()
    assert not hasattr(AutoConfig.from_pretrained(out), "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the ring")["input_ids"] == tiny_tokenizer()("the ring")["input_ids"]


def test_a_process_without_subbit_opens_it(folders, tmp_path):
    out = export_dense(folders("llama"), tmp_path / "dense")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"said = model(torch.tensor({tokens().tolist()})).logits\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'subbit']\n"
        "print(said.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == logits(load(folders("llama"))).double().sum().item()


def test_one_shard_is_in_memory_at_a_time(sharded, tmp_path, monkeypatch):
    sizes = []
    plain = export.save_file

    def counted(tensors, *args, **options):
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        plain(tensors, *args, **options)

    monkeypatch.setattr(export, "save_file", counted)
    done = []
    export_dense(sharded, tmp_path / "dense", max_shard_size=60_000, advance=done.append)
    assert len(sizes) > 3
    largest = 320 * 64 * 4  # the embedding is larger than a shard and has one of its own
    assert max(sizes) == largest and sum(size > 60_000 for size in sizes) <= 2
    assert len(done) == len(sizes)


def test_a_model_saved_again_by_transformers(tmp_path):
    load(save(int8_model("llama"), tmp_path / "packed")).save_pretrained(tmp_path / "again")
    out = export_dense(tmp_path / "again", tmp_path / "dense")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(int8_model("llama"))
    )


def test_failures_leave_nothing(folders, copy_of, tmp_path):
    folder = copy_of(folders("llama"))
    with pytest.raises(RecipeError, match="unknown dtype 'int8'"):
        export_dense(folder, tmp_path / "dense", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputError, match="exists already"):
        export_dense(folder, tmp_path / "full")
    with pytest.raises(ModelError, match="no config"):
        export_dense(tmp_path / "full", tmp_path / "dense")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_damaged_codes_are_named(folders, copy_of, tmp_path):
    folder = copy_of(folders("llama"))
    (folder / "subbit.json").unlink()
    path = folder / "model.safetensors"
    name = f"{packed_names(packed_model('llama'))[0]}.mask"
    with safe_open(path, framework="pt") as file:
        mask = file.get_tensor(name)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(mask.numpy().tobytes(), b"\xff" * mask.numel()))
    with pytest.raises(FormatError, match=r"'model\.layers\.0.*mask"):
        export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_the_command(folders, tmp_path):
    folder = str(folders("llama"))
    said = CliRunner().invoke(app, ["export", folder, "--dense", str(tmp_path / "d")])
    assert said.exit_code == 0, said.output
    assert (tmp_path / "d" / "config.json").is_file()
    assert CliRunner().invoke(app, ["export", folder]).exit_code == 2
