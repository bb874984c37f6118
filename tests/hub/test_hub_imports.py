"""`import subbit` is light, works before and after transformers, and no load is silently random."""

import os
import subprocess
import sys

import pytest
import torch
from packed_models import logits, packed_model
from safetensors.torch import load_file

FAMILIES = ["llama", "llama-gqa", "opt", "gpt2", "gemma"]

# check(folder, out): load as a user would and write the logits
CHECK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
def check(folder, out, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, out)
    return model
"""

FINDER = """
import inspect, sys, subbit
def waiting():
    return [finder for finder in sys.meta_path if type(finder).__module__ == "subbit.hub.hook"]
assert len(waiting()) == 1
import transformers.quantizers.auto as auto
assert not waiting()
assert "subbit" in auto.AUTO_QUANTIZER_MAPPING
assert "frozen" in type(auto.__loader__).__module__ and auto.__spec__.loader is auto.__loader__
assert "def register_quantizer" in inspect.getsource(auto)
"""

REFUSED = """
for folder in sys.argv[3:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused", "ignore_mismatched_sizes" in str(error))
"""

NOT_INSTALLED = """
import importlib.abc
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "subbit":
            raise ModuleNotFoundError("No module named 'subbit'", name="subbit")
sys.meta_path.insert(0, Gone())
cache, *folders = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=True)
except ImportError as error:
    print("told", "pip install subbit" in str(error))
del sys.meta_path[0]
"""

REMOTE = """
for i, folder in enumerate(folders):
    model = check(folder, f"{cache}/{i}", trust_remote_code=True)
    model.save_pretrained(f"{cache}/again{i}")
    check(f"{cache}/again{i}", f"{cache}/{i}b", trust_remote_code=True)
"""


def run(code: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_import_subbit_loads_nothing_heavy():
    code = (
        "import sys, subbit\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'pydantic', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_subbit_before_transformers_and_reloaded(folders, tmp_path):
    reload = "\nimport importlib\nimportlib.reload(subbit)\n"
    out = tmp_path / "out.safetensors"
    code = "import subbit\n" + reload + FINDER + CHECK + reload + "check(*sys.argv[1:])\n"
    done = run(code, folders("llama"), out)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(out)["logits"], logits(packed_model("llama")))


def test_without_subbit_a_load_fails_and_after_its_import_it_works(folders, tmp_path):
    out = tmp_path / "out.safetensors"
    code = CHECK + REFUSED + "\nimport subbit\ncheck(*sys.argv[1:3])\n"
    done = run(code, folders("llama"), out, *(folders(family) for family in FAMILIES))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "True"] * len(FAMILIES)
    assert "Unknown quantization type, got subbit" in done.stderr
    assert torch.equal(load_file(out)["logits"], logits(packed_model("llama")))


def test_trust_remote_code_needs_no_import_but_the_package(folders, tmp_path):
    families = ["llama", "gpt2"]
    code = CHECK + NOT_INSTALLED + REMOTE
    done = run(code, tmp_path, *map(folders, families), HF_MODULES_CACHE=str(tmp_path / "code"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["told", "True"]
    for i, family in enumerate(families):
        for name in (f"{i}", f"{i}b"):
            found = load_file(tmp_path / name)["logits"]
            assert torch.equal(found, logits(packed_model(family))), (family, name)


@pytest.mark.parametrize(
    "module", ["subbit.hub.quantizer", "subbit.hub.load", "subbit.hub.config", "subbit.compression"]
)
def test_every_module_can_be_the_first_one_imported(module):
    code = f"import {module}; from transformers.quantizers import auto; "
    code += "assert 'subbit' in auto.AUTO_QUANTIZER_MAPPING"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
