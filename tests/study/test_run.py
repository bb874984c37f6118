"""Studies on a tiny random model: what is measured, what is not measured again, what fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subbit.errors import StudyError
from subbit.recipe import load_recipe
from subbit.study import cells as cells_module
from subbit.study import run as run_module
from subbit.study.ablations import ABLATIONS
from subbit.study.cells import Cell, Protocol
from subbit.study.run import run_study
from subbit.study.studies import Study
from subbit.study.tables import markdown

PROTOCOL = Protocol(nsamples=2, seqlen=24, windows=2, c4_from=100)
GOOD = Cell("good", "rtn-2")


def study_of(*cells, **kwargs):
    return Study("A title", PROTOCOL, list(cells), **kwargs)


def test_a_cell_is_measured_once_for_all_studies(tmp_path, model):
    said = []
    first = run_study("one", study_of(GOOD), model, tmp_path, [], said.append)
    assert not first.failures and "| good |" in first.table
    assert (tmp_path / "one" / "table.md").read_text() == first.table
    record = json.loads((tmp_path / "one" / "good.json").read_text())
    assert record["vocabulary"] == 320
    assert not (tmp_path / "one" / "good.model").exists()

    again = Cell("under-another-name", "rtn-2")
    said.clear()
    other = run_study("two", study_of(again), model, tmp_path, [], said.append)
    assert said == ["under-another-name: already measured in one"]
    assert "| under-another-name |" in other.table
    assert first.table.replace("good", "under-another-name") == other.table
    assert not (tmp_path / "two" / "under-another-name.json").exists()

    said.clear()
    run_study("one", study_of(GOOD, again), model, tmp_path, [], said.append)
    assert said == ["good: already measured", "under-another-name: already measured as good"]


@pytest.mark.parametrize("what", ["overrides", "recipe", "protocol", "model", "broken"])
def test_what_differs_is_another_cell(tmp_path, model, what):
    run_study("one", study_of(GOOD), model, tmp_path, [], lambda _: None)
    path = tmp_path / "one" / "good.json"
    record = json.loads(path.read_text())
    if what in record["cell"]:  # what old records are known by
        del record["recipe_sha256"]
        record["cell"][what] = {"overrides": ["group=row"], "recipe": "rtn-3"}[what]
    elif what == "protocol":
        record["protocol"]["windows"] = 3
    else:
        record["model"] = "another"
    path.write_text("{" if what == "broken" else json.dumps(record))
    said = []
    run_study("two", study_of(Cell("good", "rtn-2")), model, tmp_path, [], said.append)
    assert said[0] == "good: rtn-2 " and (tmp_path / "two" / "good.json").exists()


def test_other_weights_of_the_same_name_are_another_model(tmp_path, model):
    run_study("one", study_of(GOOD), model, tmp_path, [], lambda _: None)
    other = tmp_path / "elsewhere" / Path(model).name
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    said = []
    run_study("one", study_of(GOOD), str(other), tmp_path, [], said.append)
    assert said[0] == "good: rtn-2 "


def test_weights_in_bin_files_tell_models_apart(tmp_path, model):
    folders = [tmp_path / "a" / "same", tmp_path / "b" / "same"]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        torch.save({"weight": torch.full((2,), i)}, folder / "pytorch_model.bin")
    one, two = (cells_module._weights_digest(str(folder)) for folder in folders)
    assert one and two and one != two
    assert cells_module._weights_digest("owner/model") is None


def test_hub_models_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cells_module, "_measured", lambda settings, _: seen.append(settings) or 1)
    for model in ("one/same", "two/same"):
        with pytest.raises(TypeError):
            cells_module.run_cell(GOOD, model, PROTOCOL, tmp_path)
    assert not cells_module._same(seen[0], seen[1]) and cells_module._same(seen[0], seen[0])
    local = seen[0] | {"weights_sha256": "of a local folder"}
    assert not cells_module._same(seen[0], local) and not cells_module._same(local, seen[0])


def test_other_text_is_measured_again(tmp_path, model, monkeypatch):
    run_study("one", study_of(GOOD), model, tmp_path, [], lambda _: None)
    digest = cells_module._text_digest
    cells_module._text_digest.cache_clear()
    monkeypatch.setattr(
        cells_module, "_text_digest", lambda name, role: digest(name, role) and name
    )
    said = []
    run_study("one", study_of(GOOD), model, tmp_path, [], said.append)
    assert said[0] == "good: rtn-2 "
    monkeypatch.setattr(cells_module, "_text_digest", lambda *_: None)  # no network, say
    run_study("one", study_of(GOOD), model, tmp_path, [], said.append)
    assert said[-1] == "good: already measured"


def test_a_cell_cut_off_under_other_settings_starts_over(tmp_path, model, monkeypatch):
    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("subbit.compression.Workdir.publish", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_study("one", study_of(GOOD), model, tmp_path, [], lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    said = []
    try:
        result = run_study("one", study_of(GOOD), model, tmp_path, [], said.append)
    finally:
        torch.set_num_threads(threads)
    assert not result.failures
    assert any("starting over" in line and "threads was" in line for line in said)


def test_a_figure_that_cannot_be_drawn_loses_no_table(tmp_path, model, monkeypatch):
    def missing(*args):
        raise StudyError("the figure needs matplotlib")

    monkeypatch.setattr(run_module, "draw", missing)
    result = run_study("one", study_of(GOOD, figure=True), model, tmp_path, [], lambda _: None)
    assert "| good |" in result.table and (tmp_path / "one" / "table.md").is_file()
    assert result.failures == {"figure": "the figure needs matplotlib"}


def test_the_same_recipe_said_otherwise_is_the_same_cell(tmp_path, model):
    run_study("one", study_of(GOOD), model, tmp_path, [], lambda _: None)
    unused = Cell("unused", "rtn-2", ["asymmetry.linears=all", "asymmetry.strength=0"])
    said = []
    run_study("one", study_of(unused), model, tmp_path, [], said.append)
    assert said == ["unused: already measured as good"]


def test_a_cell_whose_recipe_has_changed_is_measured_again(tmp_path, model, monkeypatch):
    said = []
    run_study("s", study_of(GOOD), model, tmp_path, [], said.append)
    run_study("s", study_of(GOOD), model, tmp_path, [], said.append)
    assert said[-1] == "good: already measured"
    changed = load_recipe("rtn-2").override(["blocksize=64"])
    monkeypatch.setattr("subbit.study.cells.load_recipe", lambda name: changed)
    run_study("s", study_of(GOOD), model, tmp_path, [], said.append)
    assert said[-1] != "good: already measured"


def test_a_failing_cell_does_not_lose_the_others(tmp_path, model, monkeypatch):
    run_cell = run_module.run_cell

    def breaks(cell, *args):
        if cell.name == "bug":
            raise ZeroDivisionError("by nothing")
        return run_cell(cell, *args)

    monkeypatch.setattr(run_module, "run_cell", breaks)
    bad = Cell("bad", "pbs2p-4-8", ["blocksize=12"])
    cells = (bad, Cell("bug", "rtn-2"), GOOD)
    said = []
    result = run_study("s", study_of(*cells), model, tmp_path, [], said.append)
    assert list(result.failures) == ["bad", "bug"]
    assert "blocksize 12" in result.failures["bad"]
    assert result.failures["bug"] == "ZeroDivisionError: by nothing"
    assert "| good |" in result.table and "| bad |" not in result.table
    assert any(line.startswith("bad: failed: ") for line in said)
    with pytest.raises(StudyError, match=r"not measured: bad: .*bug: Zero.*same command again"):
        result.raise_failures()
    nothing = run_study("none", study_of(bad), model, tmp_path, [], said.append)
    assert nothing.table == "" and list(nothing.failures) == ["bad"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ABLATIONS if name != "pruning-types"]


@pytest.mark.parametrize("name", ["pruning-types", *SLOW])
def test_the_ablations_run(tmp_path, model, name):
    title, _, cells = ABLATIONS[name]
    result = run_study(name, Study(title, PROTOCOL, cells), model, tmp_path, [], lambda _: None)
    assert not result.failures
    assert all(f"| {cell.name} |" in result.table for cell in cells)


def record(name, wikitext2, c4, vocabulary=320):
    return {
        "model": "m",
        "cell": {"name": name, "recipe": None, "overrides": []},
        "protocol": {
            "calibration": "c4", "nsamples": 1, "seqlen": 2, "windows": 3, "c4_from": 4,
        },
        "wikitext2": {"perplexity": wikitext2, "stderr": 0.5},
        "c4": {"perplexity": c4},
        "vocabulary": vocabulary,
    }  # fmt: skip


def test_a_perplexity_above_the_vocabulary_is_shown_as_such():
    table = markdown("t", [record("a", 20.5, 321.0)])
    assert "| 20.50 ± 0.50 | 321.00 † |" in table and "Above 320, the size" in table
    assert "†" not in markdown("t", [record("a", 20.5, 320.0)])


def test_an_infinite_perplexity_is_no_error():
    table = markdown("t", [record("a", None, 30.0), record("b", 20.0, 30.0)])
    assert "| inf † | 30.00 |" in table


def test_published_figures_stand_beside_ours():
    rows = [record("billm", 20.5, 30.0, 49152), record("pbs2p-6-8", 20.5, 30.0, 49152)]
    table = markdown("t", rows, beside_published=True)
    assert "| published code: WikiText-2 | published code: C4 |" in table
    assert "| 58838.00 † | 25908.00 | 0.0833 |" in table
    assert table.count("†") == 2  # the figure and the note
    assert "published" not in markdown("t", rows).lower()


def test_a_cell_may_have_a_calibration_size_of_its_own(tmp_path, model):
    larger = Cell("larger", "rtn-2", ["calibration.nsamples=3"])
    run_study("s", study_of(GOOD, larger), model, tmp_path, [], lambda _: None)
    sizes = [
        json.loads((tmp_path / "s" / f"{name}.json").read_text())["calibration"]["nsamples"]
        for name in ("good", "larger")
    ]
    assert sizes == [2, 3]


@pytest.mark.parametrize("other", ["nothing", "recipe", "model"])
def test_what_a_cut_off_cell_has_packed_is_used_if_it_is_the_same(
    tmp_path, model, monkeypatch, other
):
    made = []

    def cut_off(*args):
        raise KeyboardInterrupt

    def counts(*args, **kwargs):
        made.append(args[1].options)
        return compress(*args, **kwargs)

    compress = cells_module.compress
    monkeypatch.setattr(cells_module, "compress", counts)
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "perplexity", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_study("s", study_of(GOOD), model, tmp_path, [], lambda _: None)
    assert (tmp_path / "s" / "good.model").is_dir()
    cell = Cell("good", "rtn-2", ["group=row"]) if other == "recipe" else GOOD
    if other == "model":
        model = shutil.copytree(model, tmp_path / "another")
    assert not run_study("s", study_of(cell), str(model), tmp_path, [], lambda _: None).failures
    again = {"nothing": [], "recipe": ["row"], "model": ["block"]}[other]
    assert [options["group"] for options in made] == ["block", *again]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["good.json", "table.md"]
