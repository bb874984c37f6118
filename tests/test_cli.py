"""The command line: exit codes, one-line errors, what is passed on and what is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import pytest
from typer.testing import CliRunner

import subbit
from subbit import errors
from subbit.cli import app
from subbit.recipe import load_recipe
from subbit.study.run import run_study

TOTAL = {
    "weights": 32,
    "paper_bits": 0.8,
    "stored_bits": 2.25,
    "linear_bytes": 9,
    "other_bytes": 100,
    "header_bytes": 8,
    "file_bytes": 117,
    "file_bits_per_parameter": 9.5,
    "file_bits_without_embeddings": None,
}
LINEAR = {
    "name": "model.layers.0.mlp.up_proj",
    "shape": [4, 8],
    "nm": [6, 8],
    "loss": 0.1234567,
    "salient_share": 0.125,
    "damping": 0.01,
    "paper_bits": 0.8,
    "stored_bits": 2.25,
    "bytes": 9,
}
FOUND = {"format_version": 1, "recipe": {}, "calibration": {}, "linears": [LINEAR], "total": TOTAL}


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    parent = name.rpartition(".")[0]
    if parent != "subbit" and parent not in sys.modules:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


def run(*arguments: object, **environment: str) -> SimpleNamespace:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment or None)
    return SimpleNamespace(
        code=result.exit_code, out=result.stdout, err=result.stderr, exception=result.exception
    )


@pytest.fixture
def compressions(monkeypatch) -> list[SimpleNamespace]:
    calls: list[SimpleNamespace] = []

    def compress(model, recipe, calibration=None, **options):
        calls.append(
            SimpleNamespace(model=model, recipe=recipe, calibration=calibration, **options)
        )

    stub(monkeypatch, "subbit.compression", compress=compress)
    stub(monkeypatch, "subbit.hub.inspect", inspect_folder=lambda folder: FOUND)
    return calls


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom subbit.cli import main\n"
        "sys.argv = ['subbit', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), 'loaded')"
    )
    for arguments in (["--help"], ["compress", "--help"], ["recipes"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.splitlines()[-1].strip() == "loaded", arguments


def test_help_names_every_command():
    said = run("--help")
    assert said.code == 0
    commands = "compress eval generate chat inspect bench export recipes methods study"
    for command in commands.split():
        assert command in said.out
        assert run(command, "--help").code == 0
    assert "--install-completion" in said.out


def test_version():
    assert run("--version").out == f"subbit {subbit.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["compres"],
        ["compress"],
        ["compress", "m"],
        ["compress", "m", "--out", "x", "--resume", "maybe"],
        ["compress", "m", "--out", "x", "--nsamples", "0"],
        ["compress", "m", "--out", "x", "--dtype", "int8"],
        ["eval", "m"],
        ["generate", "m"],
    ],
)
def test_usage_errors(arguments):
    said = run(*arguments)
    assert said.code == 2
    assert said.out == "" and said.err


def test_compress_passes_everything_on(compressions, tmp_path):
    out = tmp_path / "packed"
    said = run(
        "compress", "some/model", "--out", out, "--recipe", "pbs2p-5-8", "--calibration", "stdlib",
        "--nsamples", 4, "--seqlen", 64, "--device", "cpu", "--dtype", "float32", "--resume",
        "never", "--set", "tau=5", "--set", "coarse.n_low=0", "--seed", 7,
    )  # fmt: skip
    assert said.code == 0, said.err
    (call,) = compressions
    changed = load_recipe("pbs2p-5-8").override(["tau=5", "coarse.n_low=0", "calibration.seed=7"])
    assert call.recipe == changed
    assert (call.model, call.calibration, call.out) == ("some/model", "stdlib", out)
    assert (call.nsamples, call.seqlen, call.device) == (4, 64, "cpu")
    assert (call.dtype, call.resume, call.progress) == ("float32", "never", True)
    assert "0.800 paper bits beside 2.250 stored bits" in said.out


def test_compress_leaves_the_defaults_to_the_recipe(compressions, tmp_path):
    said = run("compress", "m", "--out", tmp_path / "packed", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")
    (call,) = compressions
    assert call.recipe == load_recipe("pbs2p-6-8")
    assert (call.calibration, call.nsamples, call.seqlen) == (None, None, None)
    assert (call.device, call.dtype, call.resume, call.progress) == ("auto", "auto", "auto", False)


def one_line(said: SimpleNamespace) -> str:
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


def test_mistakes_end_before_any_work(compressions, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    good = ["compress", "m", "--out", tmp_path / "new"]
    for arguments, code, words in [
        (["compress", "m", "--out", there], 6, "there exists already"),
        (["compress", "m", "--out", tmp_path / "no" / "x"], 6, "does not exist"),
        ([*good, "--recipe", "pbs2p-68"], 2, "did you mean 'pbs2p-6-8'?"),
        ([*good, "--set", "blocksiz=64"], 2, "did you mean 'blocksize'?"),
        ([*good, "--set", "nm=9:8"], 2, "9:8"),
        ([*good, "--set", "blocksize=100"], 2, "multiple of M = 8"),
        ([*good, "--resume", "required"], 7, "no unfinished run"),
    ]:
        said = run(*arguments)
        assert said.code == code, said.err
        assert words in one_line(said)
    assert not compressions
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


KINDS = [
    errors.RecipeError,
    errors.ModelError,
    errors.NonFiniteError,
    errors.CalibrationError,
    errors.FormatError,
    errors.OutputError,
    errors.CheckpointError,
]


def failing(error: BaseException):
    def compress(*args, **options):
        raise error

    return compress


@pytest.mark.parametrize("kind", KINDS)
def test_our_errors_are_one_line_and_an_exit_code(monkeypatch, tmp_path, kind):
    error = kind("q_proj of\n[block 3] is wrong")
    stub(monkeypatch, "subbit.compression", compress=failing(error))
    said = run("compress", "m", "--out", tmp_path / "new", SUBBIT_DEBUG="")
    assert said.code == kind.exit_code
    assert one_line(said) == "error: q_proj of [block 3] is wrong\n"


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    stub(monkeypatch, "subbit.compression", compress=failing(errors.ModelError("wrong")))
    said = run("compress", "m", "--out", tmp_path / "new", SUBBIT_DEBUG="1")
    assert isinstance(said.exception, errors.ModelError)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    stub(monkeypatch, "subbit.compression", compress=failing(ZeroDivisionError("bug")))
    said = run("compress", "m", "--out", tmp_path / "new")
    assert isinstance(said.exception, ZeroDivisionError)


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    stub(monkeypatch, "subbit.compression", compress=failing(KeyboardInterrupt()))
    said = run("compress", "m", "--out", tmp_path / "new")
    assert said.code == 130
    assert said.err.startswith("interrupted") and said.err.count("\n") == 1
    assert "same command again" in said.err


def test_a_real_process_ends_the_same_way(tmp_path):
    code = "import sys; sys.argv[0] = 'subbit'; from subbit.cli import main; main()"
    command = [sys.executable, "-c", code, "compress", "m", "--out", str(tmp_path)]
    environment = {**os.environ, "SUBBIT_DEBUG": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 6
    assert ended.stderr == (
        f"error: the output {tmp_path} exists already; remove it or choose another folder\n"
    )


def test_inspect(monkeypatch):
    stub(monkeypatch, "subbit.hub.inspect", inspect_folder=lambda folder: FOUND)
    stub(monkeypatch, "subbit.hub.backend", kernel_in_words=lambda folder: f"kernel of {folder}")
    said = run("inspect", "packed")
    assert said.code == 0
    (row,) = [line.split() for line in said.out.splitlines() if LINEAR["name"] in line]
    assert row == [
        LINEAR["name"], "4", "x", "8", "6:8", "0.1235", "12.5%", "0.01", "0.800", "2.250", "9",
    ]  # fmt: skip
    assert "0.800 paper bits beside 2.250 stored bits" in said.out
    assert "117 bytes, 9.500 bits per parameter (– without embeddings)" in said.out
    assert "Paper bits count" in said.out
    assert "kernel of packed" in said.out
    assert json.loads(run("inspect", "packed", "--json").out) == FOUND


def test_recipes():
    assert "pbs2p-6-8" in run("recipes").out
    listed = json.loads(run("recipes", "--json").out)
    assert {"pbs2p-3-8", "pbs2p-2-4"} <= {recipe["name"] for recipe in listed}
    assert all(recipe["nm"] is None or recipe["nm"].count(":") == 1 for recipe in listed)


def test_methods(monkeypatch):
    recipes = [
        {"name": "a", "paper_bits": 0.55, "stored_bits": 3.301, "speed": "minutes"},
        {"name": "b", "paper_bits": 0.825, "stored_bits": 3.301, "speed": None},
    ]
    method = {"name": "pbs2p", "paper": "PBS2P", "year": 2026, "summary": "s", "options": {}}
    method |= {"recipes": recipes, "packed": True}
    stub(monkeypatch, "subbit.study.overview", methods_overview=lambda: [method])
    row = next(line for line in run("methods").out.splitlines() if "PBS2P (2026)" in line)
    assert row.split()[-5:] == ["0.550–0.825", "3.301", "minutes", "yes", "s"]
    assert json.loads(run("methods", "--json").out) == [method]


def test_a_study_prints_its_table_even_where_a_cell_failed(monkeypatch):
    def fail():
        raise errors.StudyError("1 cells could not be measured")

    result = SimpleNamespace(table="| the table |", raise_failures=fail)
    measure = create_autospec(run_study, return_value=result)
    stub(monkeypatch, "subbit.study.studies", STUDIES={}, study=lambda name: f"study {name}")
    stub(monkeypatch, "subbit.study.run", run_study=measure)
    said = run(
        "study", "methods", "--model", "m", "--out", "o", "--only", "a", "--dtype", "float32"
    )
    assert (said.code, said.out) == (8, "| the table |\n")
    *given, say, dtype = measure.call_args.args
    assert given == ["methods", "study methods", "m", Path("o"), ["a"]] and dtype == "float32"
    assert callable(say)
    assert said.err == "error: 1 cells could not be measured\n"


@pytest.fixture
def models(monkeypatch) -> list[tuple]:
    calls: list[tuple] = []

    def load(path, **options):
        calls.append(("packed", path, options))
        return "packed model"

    def load_model(source, **options):
        calls.append(("dense", source, options))
        return SimpleNamespace(model="dense model", tokenizer="its tokenizer")

    is_packed = "packed".__eq__
    stub(monkeypatch, "subbit.hub.inspect", is_packed=is_packed)
    stub(monkeypatch, "subbit.hub.fetch", is_packed_on_hub=lambda hub_id: False)
    stub(monkeypatch, "subbit.hub.load", load=load, load_tokenizer=lambda path: "its tokenizer")
    stub(monkeypatch, "subbit.model.load", load_model=load_model)
    return calls


@pytest.fixture
def evaluations(monkeypatch, models) -> list[tuple]:
    calls: list[tuple] = []
    text = SimpleNamespace(name="words", origin="file words.txt")

    def make_windows(given, tokenizer, **options):
        calls.append(("windows", tokenizer, options))
        return SimpleNamespace(nsamples=3, seqlen=options["seqlen"])

    def perplexity(model, windows, *, advance):
        advance(1)
        calls.append(("perplexity", model))
        facts = {"perplexity": 12.5, "stderr": 0.25}
        return SimpleNamespace(**facts, to_dict=lambda: facts)

    def load_text(source, role):
        calls.append(("text", source, role))
        return text

    stub(monkeypatch, "subbit.text.sources", load_text=load_text)
    hint = {"begins_with_bos": lambda tokenizer: True}
    stub(monkeypatch, "subbit.text.windows", make_windows=make_windows, **hint)
    stub(monkeypatch, "subbit.evaluate.perplexity", perplexity=perplexity)
    return calls


@pytest.mark.parametrize("source", ["packed", "dense"])
def test_eval(evaluations, models, source):
    said = run("eval", source, "--data", "words.txt", "--seqlen", 64, "--windows", 3, "--bos",
               "document", "--skip-tokens", 5, "--device", "cpu", "--dtype", "float32")  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith("perplexity 12.5000 ± 0.25 (words: 3 windows of 64 tokens")
    assert "--bos window" not in said.err  # it was said where they go
    kind, path, options = models[0]
    assert (kind, path) == (source, source)
    assert (options["device"], options["dtype"]) == ("cpu", "float32")
    options = {"nsamples": 3, "seqlen": 64, "bos": "document", "skip_tokens": 5}
    assert evaluations == [
        ("text", "words.txt", "evaluation"),
        ("windows", "its tokenizer", options),
        ("perplexity", f"{source} model"),
    ]


def test_eval_json_is_alone_on_stdout(evaluations):
    said = run("eval", "packed", "--data", "words.txt", "--json")
    assert json.loads(said.out) == {"perplexity": 12.5, "stderr": 0.25}
    assert "perplexity on words" in said.err and "--bos window" in said.err


def test_generate_and_chat(monkeypatch, models):
    calls = []

    def generate(model, tokenizer, prompt, **options):
        options.pop("stream")("the answer")
        calls.append((model, tokenizer, prompt, options))

    def chat_loop(model, tokenizer, **options):
        calls.append((model, tokenizer, options))

    stub(monkeypatch, "subbit.evaluate.generate", generate=generate)
    stub(monkeypatch, "subbit.evaluate.chat", chat_loop=chat_loop)
    said = run("generate", "packed", "Why?", "--max-new-tokens", 4, "--no-chat", "--seed", 3,
               "--temperature", 0.5, "--top-p", 0.9)  # fmt: skip
    assert (said.code, said.out) == (0, "the answer\n")
    sampling = {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert calls[0] == ("packed model", "its tokenizer", "Why?", {**sampling, "chat": False})
    assert run("chat", "packed", "--max-new-tokens", 9).code == 0
    assert calls[1][2]["max_new_tokens"] == 9
    assert models[0][2]["keep_dense"] is True
