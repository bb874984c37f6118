import pytest
from test_run import PROTOCOL, record

from subbit.recipe import load_recipe
from subbit.study.figure import draw, front
from subbit.study.run import run_study
from subbit.study.studies import STUDIES, Study


def rows():
    return STUDIES["ablation"].cells


def test_every_row_of_the_ablation_adds_to_the_one_before_up_to_the_recipes():
    before, settings = None, []
    for cell in rows():
        recipe = load_recipe(cell.recipe).override(cell.overrides)
        assert recipe != before
        before = recipe
        settings.append(recipe.model_dump(mode="json"))
    *_, plain, blocks, refit = (load_recipe(c.recipe).override(c.overrides) for c in rows())
    assert plain == load_recipe("pbs2p-plus-6-8")
    assert refit == load_recipe("pbs2p-plus-refit-6-8")
    assert blocks.refit.steps and not blocks.refit.model_steps
    first = settings[0]
    assert (first["options"]["codebook"], first["options"]["spbo"]) == ("groups", False)
    assert (first["levels"], first["asymmetry"]["strength"]) == ("fp16", 0)


def test_off_rows_are_pbs2p():
    spbo = load_recipe("pbs2p-plus-6-8").override(rows()[1].overrides)
    paper = load_recipe("pbs2p-6-8").override(["coarse.allocation=uniform"])
    ours, theirs = spbo.model_dump(), paper.model_dump()
    for key in ("nm", "blocksize", "percdamp", "levels", "calibration", "coarse", "asymmetry"):
        assert ours[key] == theirs[key], key


def test_refit_recipes_are_the_others_and_refit_them():
    for nm in ("6-8", "5-8", "4-8"):
        plain, refit = load_recipe(f"pbs2p-plus-{nm}"), load_recipe(f"pbs2p-plus-refit-{nm}")
        assert refit.refit.steps and refit.refit.model_steps and not plain.refit.steps
        if nm == "4-8":  # has three settings more, which no other recipe has
            more = ["outputs=gradient", "residual=relative", "allocation=measured"]
            plain = plain.override([*more, "n_high=4", "n_low=2"])
        own = {"name": refit.name, "refit": refit.refit.model_dump()}
        assert refit.model_dump() == plain.model_dump() | own


def test_front_keeps_what_nothing_beats():
    points = [(3.0, 20.0), (1.0, 90.0), (2.0, 95.0), (2.0, 40.0), (4.0, 20.0)]
    assert front(points) == [(1.0, 90.0), (2.0, 40.0), (3.0, 20.0)]


def packed(name, bits, perplexity):
    found = record(name, perplexity, 30.0)
    return found | {
        "cell": {"name": name, "recipe": name, "overrides": []},
        "total": {"stored_bits": bits},
    }


def test_a_figure_is_drawn_and_is_the_same_every_time(tmp_path):
    records = [record("original", 20.5, 30.0), packed("gptq-2", 2.1, 900.0), packed("x", 3, 40.0)]
    draw("t", records, tmp_path / "a.png")
    draw("t", records, tmp_path / "b.png")
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "b.png").read_bytes()
    draw("t", records[:-1], tmp_path / "b.png")
    assert first != (tmp_path / "b.png").read_bytes()
    draw("t", [record("original", None, 30.0), *records[1:]], tmp_path / "b.png")  # infinite
    assert first != (tmp_path / "b.png").read_bytes()


def test_names_in_a_figure_cover_nothing(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    named = []
    annotate = Axes.annotate

    def watched(self, *args, **kwargs):
        named.append((self, annotate(self, *args, **kwargs)))
        return named[-1][1]

    monkeypatch.setattr(Axes, "annotate", watched)
    crowd = [packed(f"x-{i}", 2 + 0.002 * i, 30 + 0.4 * i) for i in range(3)]
    far = [packed("gptq-2", 2.1, 900.0), packed("gptq-1", 1.1, 9000.0)]
    draw("t", [record("original", 20.5, 30.0), *crowd, *far], tmp_path / "a.png")
    written = [(axes, text) for axes, text in named if text.axes is axes]
    panels = [text.axes for _, text in sorted(written, key=lambda one: one[1].get_text())]
    assert [text.get_text() for _, text in written].count("gptq-2") == 1
    assert len(panels) == 5 and panels[0] is panels[1] and panels[0] is not panels[2]
    boxes = [text.get_window_extent() for _, text in written]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ablation", "pareto"])
def test_the_studies_run(name, tmp_path, model, monkeypatch):
    drawn = []

    def draw_nothing(title, records, path):
        drawn.append(title)
        path.touch()

    monkeypatch.setattr("subbit.study.run.draw", draw_nothing)
    found = STUDIES[name]
    small = Study(found.title, PROTOCOL, found.cells, figure=found.figure)
    result = run_study(name, small, model, tmp_path, [], lambda _: None)
    assert not result.failures
    assert all(f"| {cell.name} |" in result.table for cell in found.cells)
    assert bool(drawn) == (name == "pareto")
