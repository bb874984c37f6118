import pytest

from subbit.errors import RecipeError
from subbit.methods import make_method
from subbit.recipe import load_recipe
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
