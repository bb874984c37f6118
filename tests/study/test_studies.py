import pytest

from subbit.errors import RecipeError
from subbit.methods import make_method
from subbit.recipe import load_recipe
from subbit.study.reference import published_figures
from subbit.study.run import run_study
from subbit.study.studies import STUDIES, study


def test_every_cell_is_a_recipe_whose_changes_mean_something():
    for found in STUDIES.values():
        assert len({cell.name for cell in found.cells}) == len(found.cells)
        for cell in found.cells:
            if cell.recipe is not None:
                plain = load_recipe(cell.recipe)
                changed = plain.override(cell.overrides)
                make_method(changed.method, changed.options)
                assert (changed != plain) == bool(cell.overrides)


def test_unknown_studies_and_cells_and_a_missing_model_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'pbs2p'"):
        study("pbs2")
    with pytest.raises(RecipeError, match=r"no cell 'orignal'.*'original'"):
        run_study("pbs2p", study("pbs2p"), "m", tmp_path, ["orignal"])
    with pytest.raises(RecipeError, match="--model"):
        run_study("pbs2p", study("pbs2p"), "", tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_published_figures_stand_beside_cells_that_there_are():
    names = {cell.name for cell in STUDIES["methods"].cells}
    assert set(published_figures()) <= names and len(published_figures()) == 13
    assert [name for name, found in STUDIES.items() if found.beside_published] == ["methods"]


def test_the_ablations_name_every_value_of_the_papers():
    def values(name, recipe):
        cells = [cell for cell in STUDIES[name].cells if cell.recipe == recipe]
        assert sum(not cell.overrides for cell in cells) == 1  # the recipe itself is one of them
        return {cell.name.removeprefix(f"{recipe}-") for cell in cells}

    metrics = {"hessian", "wanda", "magnitude", "si", "random"}
    assert values("fine-metrics", "pbs2p-4-8") == values("fine-metrics", "stbllm-4-8") == metrics
    sizes = {"32", "64", "128", "256", "512", "1024", "row"}
    assert values("group-sizes", "pbs2p-4-8") == sizes
    assert values("split-points", "pbs2p-4-8") == {"1", "2", "3"}
    assert len(values("pruning-types", "pbs2p-4-8")) == 3
    assert len(values("coarse-rules", "pbs2p-4-8")) == 4
