"""A whole model on the CPU kernel: chosen at load, the same tokens, saved as it was."""

import random
import shutil

import pytest
import torch
from packed_models import int8_model, logits, packed_names, save, tokens

from subbit.errors import RecipeError, SubbitError
from subbit.hub.backend import kernel_in_words, set_backend
from subbit.hub.load import load
from subbit.hub.manifest import MANIFEST
from subbit.packed.kernels import kernel_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(int8_model("llama"), tmp_path_factory.mktemp("int8") / "llama")


def backends(model) -> set[str]:
    return {model.get_submodule(name).backend for name in packed_names(model)}


def close(y, wanted, bound=1e-3) -> bool:
    return bool((y - wanted).norm() <= bound * wanted.norm())


def test_backend_is_chosen_at_load(folder):
    reference = load(folder, backend="reference")
    assert backends(reference) == {"reference"}
    assert torch.equal(logits(reference), logits(int8_model("llama")))
    for backend in ("cpu", "auto"):
        model = load(folder, backend=backend)
        compiled = kernel_name() != "torch"
        assert backends(model) == ({"cpu"} if backend == "cpu" or compiled else {"reference"})
        assert close(logits(model), logits(reference))
    assert close(logits(load(folder, backend="cpu", planes=1)), logits(reference), 0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_same_tokens(family, tmp_path):
    path = save(int8_model(family), tmp_path / family)
    found = [
        load(path, dtype="float32", backend=backend).generate(
            tokens()[:, :8], max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        for backend in ("reference", "cpu")
    ]
    assert torch.equal(*found)


def test_saved_again_it_is_the_same_file(folder, tmp_path):
    model = load(folder, backend="cpu")
    model.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert backends(model) == {"cpu"}


def test_resident_memory(folder):
    model = load(folder, backend="cpu")
    for name in packed_names(model):
        module = model.get_submodule(name)
        held = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        rows, cols = module.out_features, module.in_features
        assert held * 8 / (rows * cols) < 6.5  # 64 columns: half a unit, 5.5 bits, and the flags


def test_models_that_do_not_fit(folders, folder):
    plain = load(folders("llama"))  # float16 levels
    assert backends(plain) == {"reference"}
    with pytest.raises(RecipeError, match="levels: int8"):
        load(folders("llama"), backend="cpu")
    with pytest.raises(RecipeError, match="backend is 'fast'"):
        load(folder, backend="fast")
    with pytest.raises(RecipeError, match="planes are 3"):
        load(folder, planes=3)


def test_inspect_says_what_fits(folders, folder):
    count = len(packed_names(load(folder)))
    assert kernel_in_words(folder).endswith(f": {kernel_name()}, for {count} of {count} linears.")
    assert f"for 0 of {count} linears" in kernel_in_words(folders("llama"))


def test_the_environment_turns_kernels_off(folder, monkeypatch):
    monkeypatch.setenv("SUBBIT_KERNEL", "off")
    for backend in ("auto", "cpu"):
        assert backends(load(folder, backend=backend)) == {"reference"}


def test_set_backend_on_a_loaded_model(folder):
    model = load(folder, backend="reference")
    count = len(packed_names(model))
    assert set_backend(model, "cpu") == {"reference": 0, "cpu": count}
    assert set_backend(model, "reference") == {"reference": count, "cpu": 0}
    assert torch.equal(logits(model), logits(int8_model("llama")))


@pytest.mark.filterwarnings("ignore:.*has no subbit.json")
def test_flipped_bits_without_checksums_never_crash(folder, tmp_path):
    """Every outcome but a crash is fine: refused by name, or other weights that are as valid."""
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    (spoiled / MANIFEST).unlink()
    path = spoiled / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(25):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3, 200])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))])
        try:
            model = load(spoiled, backend="cpu")
            assert logits(model).shape == (2, 12, 320)
        except SubbitError:
            refused += 1
    assert refused >= 5
