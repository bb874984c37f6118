"""The commands as a user types them, on a real tiny model and with nothing replaced."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from subbit import demo
from subbit.cli import app
from subbit.model.load import load_model
from tiny_gguf import write_gguf
from tiny_models import tiny_model, tiny_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def run(*arguments: object, **options) -> str:
    said = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    assert said.exit_code == 0, said.output
    return said.stdout


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory):
    """A dense folder, and the packed one that `subbit compress` makes of it."""
    dense, packed = (tmp_path_factory.mktemp("commands") / name for name in ("dense", "packed"))
    tiny_model("llama").save_pretrained(dense)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(dense)
    few = [
        "--set",
        "nsamples=3",
        "--set",
        "seqlen=24",
        "--set",
        "levels=int8",
        "--dtype",
        "float32",
    ]
    run("compress", dense, "--out", packed, "--calibration", text, *few)
    return dense, packed


def test_inspect(folders):
    found = json.loads(run("inspect", folders[1], "--json"))
    assert len(found["linears"]) == 21 and found["recipe"]["name"] == "pbs2p-6-8"
    assert f"{found['total']['stored_bits']:.2f}" in run("inspect", folders[1])


def test_eval(folders, text):
    window = ["--data", text, "--seqlen", 24, "--windows", 2]
    dense, packed = (json.loads(run("eval", f, *window, "--json")) for f in folders)
    assert dense["tokens"] == packed["tokens"] == 46
    assert dense["perplexity"] != packed["perplexity"]


def test_generate_and_chat(folders):
    plain = run("generate", folders[1], "the hen", "--max-new-tokens", 3, "--no-chat")
    assert plain == run("generate", folders[1], "the hen", "--max-new-tokens", 3, "--no-chat")
    sampling = ["--max-new-tokens", 3, "--temperature", 9, "--top-p", 0.9]
    drawn = {run("generate", folders[1], "the", *sampling, "--seed", seed) for seed in range(4)}
    assert len(drawn) > 1
    assert run("chat", folders[1], "--max-new-tokens", 3, input="the hen\n/exit\n")


def test_bench(folders):
    short = ["--prompt", 9, "--new-tokens", 3, "--repeats", 1]
    found = json.loads(run("bench", folders[1], "--original", folders[0], *short, "--json"))
    assert {model["model"] for model in found["models"]} >= {"packed", "original"}


def test_exports(folders, tmp_path):
    run("export", folders[1], "--dense", tmp_path / "dense", "--dtype", "float16")
    assert load_model(tmp_path / "dense").model.dtype == torch.float16


def test_lists():
    assert "ablation: " in run("study", "--list")
    assert "pbs2p-plus-6-8" in run("recipes") and "pbs2p-plus" in run("methods")


def test_the_commands_of_the_readme_have_the_options_that_it_gives():
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^\.venv/bin/subbit (.*?)\s*(?:#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        name, *words = shlex.split(line)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_the_demo_from_a_gguf_file_on_and_once_more(tmp_path, monkeypatch, capsys):
    def fetch(folder):
        if not (folder / "tiny.gguf").exists():
            write_gguf(folder / "tiny.gguf")
        return folder / "tiny.gguf"

    few = {"NSAMPLES": 2, "SEQLEN": 32, "WINDOWS": 2, "WINDOW": 32, "ANSWER": 3}
    for name, value in few.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    for words in ("recipe pbs2p-6-8, 2 x 32 tokens", "is there from an earlier demo and is used"):
        assert demo.main() == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert words in said and "stored bits per linear weight" in said and "Talk to it" in said
