"""GGUF: the same weights bit for bit, read back by gguf and by transformers, or a refusal."""

import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from packed_models import int8_model, logits, packed_names, random_linear, save
from typer.testing import CliRunner

from subbit.cli import app
from subbit.codes import CompressedLinear, LevelTable, SparseLinear, on_int8_grid
from subbit.errors import ModelError, OutputError
from subbit.hub.export_gguf import export_gguf
from subbit.hub.gguf_types import lossless
from subbit.hub.load import load
from subbit.hub.manifest import MANIFEST
from subbit.model.load import load_model
from tiny_models import tiny_tokenizer

Q8_0, TQ1_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.TQ1_0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(int8_model("llama"), tmp_path_factory.mktemp("int8") / "llama")


def test_transformers_reads_back_the_same_model(folder, tmp_path):
    file = export_gguf(folder, tmp_path / "m.gguf")
    read = load_model(file, dtype="float32")
    reference = load(folder, dtype="float32", backend="reference").dequantize()
    wanted = reference.state_dict()
    found = read.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert torch.equal(logits(read.model), logits(reference))
    text = "the ring and 1234 others"
    assert read.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert read.tokenizer.eos_token == "</s>"


def test_gguf_decodes_the_same_weights(folder, tmp_path):
    model = int8_model("llama")
    reader = GGUFReader(export_gguf(folder, tmp_path / "m.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    types = [tensor.tensor_type for tensor in tensors.values()]
    assert types.count(Q8_0) == len(packed_names(model))
    down = tensors["blk.1.ffn_down.weight"]
    wanted = model.model.layers[1].mlp.down_proj.dequantize().numpy()
    assert np.array_equal(dequantize(down.data, down.tensor_type), wanted)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.block_count"] == 3
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == fields["llama.vocab_size"] == 320


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(family, folders, tmp_path):
    with pytest.raises(ModelError, match="--dense"):
        export_gguf(folders(family), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_another_activation_is_refused(folder, copy_of, tmp_path):
    """GGUF does not say which one a llama has: readers take SiLU."""
    other = copy_of(folder)
    config = json.loads((other / "config.json").read_text()) | {"hidden_act": "gelu"}
    (other / "config.json").write_text(json.dumps(config))
    (other / MANIFEST).unlink()
    with pytest.raises(ModelError, match="hidden_act gelu"):
        export_gguf(other, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_unknown_tokenizers_are_refused(folder, copy_of, tmp_path):
    changed = copy_of(folder)
    (changed / MANIFEST).unlink()
    path = changed / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="tokenizer"):
        export_gguf(changed, tmp_path / "m.gguf")
    path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        export_gguf(changed, tmp_path / "m.gguf")


def test_nothing_is_kept_in_the_systems_folder_for_temporary_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda *a, **k: pytest.fail("spooled"))
    assert export_gguf(folder, tmp_path / "m.gguf").stat().st_size > 0
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_an_existing_file_is_left_alone(folder, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def linear_of(kind: str, groups: int, params, codes: int, **options) -> CompressedLinear:
    rows, cols = 6, 512
    rng = torch.Generator().manual_seed(0)
    low = options.pop("low", 0)
    return CompressedLinear(
        codes=torch.randint(low, codes, (rows, cols), generator=rng).byte(),
        levels=LevelTable(kind, groups, params, **options),
        group_size=128 if params.shape[1] == 4 else 512,
    )


def test_one_magnitude_is_ternary():
    one = linear_of("symmetric", 1, torch.rand(6, 1, 1).half() + 0.1, 3)
    kind, data = lossless(one)
    assert kind == TQ1_0 and data.shape == (6, 2 * 54)
    assert np.array_equal(dequantize(data, kind), one.dequantize().numpy())
    narrow = linear_of("symmetric", 1, torch.rand(6, 4, 1).half() + 0.1, 3)
    assert lossless(narrow) is None  # another magnitude after 128 columns


def test_grids_are_multiples_of_their_step():
    zero = torch.randint(0, 16, (6, 4, 1), generator=torch.Generator().manual_seed(2)).half()
    step = torch.rand(6, 4, 1, generator=torch.Generator().manual_seed(3)).half()
    grid = linear_of("grid", 16, torch.cat((step, zero), -1), 17, low=1)
    kind, data = lossless(grid)
    assert kind == Q8_0 and len(grid.dequantize().unique()) > 16
    assert np.array_equal(dequantize(data, kind), grid.dequantize().numpy())


def test_int8_levels_are_multiples_of_their_scale():
    rng = torch.Generator().manual_seed(1)
    linear = random_linear(8, 64, rng)
    levels, salient_levels = on_int8_grid(linear.levels, linear.salient_levels)
    linear = replace(linear, levels=levels, salient_levels=salient_levels)
    kind, data = lossless(linear)
    assert kind == Q8_0
    assert np.array_equal(dequantize(data, kind), linear.dequantize().numpy())


def test_what_no_type_holds():
    rng = torch.Generator().manual_seed(1)
    linear = random_linear(8, 64, rng)
    assert lossless(linear) is None  # float16 levels of any value
    levels, extra = on_int8_grid(linear.levels, linear.salient_levels)
    levels.scale.fill_(1e-9)  # a bfloat16 that no float16 is
    extra.scale.fill_(1e-9)
    assert lossless(replace(linear, levels=levels, salient_levels=extra)) is None
    assert lossless(random_linear(8, 40, rng)) is None
    values = torch.rand(4, 64).half()
    assert lossless(SparseLinear(values, torch.ones(4, 64).bool())) is None


def test_the_command(folder, folders, tmp_path):
    out = str(tmp_path / "m.gguf")
    said = CliRunner().invoke(app, ["export", str(folder), "--gguf", out])
    assert said.exit_code == 0 and said.stdout == f"saved {out}\n"
    typed = CliRunner().invoke(app, ["export", str(folder), "--gguf", out, "--dtype", "float16"])
    assert typed.exit_code != 0 and "--dtype is of" in typed.output
    both = ["export", str(folder), "--gguf", out, "--dense", str(tmp_path / "d")]
    assert CliRunner().invoke(app, both).exit_code == 2
    refused = CliRunner().invoke(app, ["export", str(folders("llama")), "--gguf", out + "2"])
    assert refused.exit_code == 3 and "without loss" in refused.stderr
