import itertools

import pytest
import torch

from subbit.binarize import descent
from subbit.binarize.refine import Coding, objective, refine, solve_levels, sweep
from subbit.errors import RecipeError


def problem(salient: bool, free: bool, seed=0, rows=6, cols=20, n=5, m=8):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator)
    X = torch.randn(40, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    columns = torch.zeros(cols, dtype=torch.bool)
    tables = (("free", 6),) if free else (("pairs", 3),)
    if salient:
        columns[[1, 9]] = True
        tables = (*tables, ("residual", 1))
    keep = torch.zeros(rows, cols, dtype=torch.bool)
    for start in range(0, cols, m):
        width = min(m, cols - start)
        order = torch.rand(rows, width, generator=generator).argsort(1)
        keep[:, start : start + width] = order < min(n, width)
    codes = torch.randint(1, 7, W.shape, generator=generator)
    codes = torch.where(columns, 1 + codes % 4, codes) * keep
    params = torch.randn(rows, 6 + 3 * salient, generator=generator)
    return W, X.T @ X / 40, Coding(codes, params, tables, columns)


CASES = [(s, f) for s in (False, True) for f in (False, True)]


@pytest.mark.parametrize(("salient", "free"), CASES)
@pytest.mark.parametrize("remask", [False, True])
def test_no_step_ever_raises_the_objective(salient, free, remask):
    for seed in range(5):
        W, S, coding = problem(salient, free, seed)
        values = [objective(W, S, coding)]
        for _ in range(4):
            coding = solve_levels(W, S, coding, 1e-3)
            values.append(objective(W, S, coding))
            coding = sweep(W, S, coding, 8, remask)
            values.append(objective(W, S, coding))
        for before, after in itertools.pairwise(values):
            assert (after <= before * (1 + 1e-4) + 1e-4).all()
        assert (values[-1] < values[0]).all()


@pytest.mark.parametrize(("salient", "free"), CASES)
def test_n_of_m_and_the_tables_are_kept(salient, free):
    W, S, coding = problem(salient, free)
    done = refine(W, S, coding, (5, 8), sweeps=3, remask=True)
    for start in range(0, 20, 8):
        before = (coding.codes[:, start : start + 8] > 0).sum(1)
        assert torch.equal((done.codes[:, start : start + 8] > 0).sum(1), before)
    assert not torch.equal(done.codes > 0, coding.codes > 0)
    assert int(done.codes[:, done.salient].max()) <= 4 if salient else True
    assert int(done.codes.max()) <= 6
    still = refine(W, S, coding, (5, 8), sweeps=3, remask=False)
    assert torch.equal(still.codes > 0, coding.codes > 0)


def test_repeated_level_solves_reach_least_squares():
    W, S, coding = problem(salient=True, free=False)
    solved = coding
    for _ in range(60):
        solved = solve_levels(W, S, solved, 1e-4)
    basis = coding.basis()
    for row in range(len(W)):
        V = basis.T[coding.codes[row] + coding.offsets()].T.double()
        A, c = V @ S.double() @ V.T, V @ S.double() @ W[row].double()
        best = torch.linalg.pinv(A, hermitian=True) @ c  # the planes may be collinear
        value = (W[row].double() - best @ V) @ S.double() @ (W[row].double() - best @ V)
        assert float(objective(W, S, solved)[row]) == pytest.approx(
            float(value), rel=1e-3, abs=1e-4
        )


def test_a_sweep_without_better_levels_changes_nothing():
    _, S, coding = problem(salient=False, free=True)
    exact = coding.values()
    done = sweep(exact, S, coding, 8, remask=True)
    torch.testing.assert_close(done.values(), exact)


def test_the_best_exchange_of_a_group_is_found():
    # the kept weight wants to be 0, a pruned one wants to be 1: identity S, levels -1 and 1
    W = torch.tensor([[0.1, 1.0, 0.9, -1.0]])
    coding = Coding(
        torch.tensor([[2, 0, 2, 1]]),
        torch.tensor([[-1.0, 1.0]]),
        (("free", 2),),
        torch.zeros(4, dtype=torch.bool),
    )
    done = sweep(W, torch.eye(4), coding, 4, remask=True)
    assert done.codes.tolist() == [[0, 2, 2, 1]]


@pytest.fixture(params=["compiled", "torch"])
def either_sweep(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("SUBBIT_DESCENT", "off")
    elif not descent.is_compiled():
        pytest.skip("the compiled sweep was not built")


@pytest.mark.parametrize(("salient", "free"), CASES)
@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 8), (8, 24), (13, 20), (37, 128)])
def test_the_compiled_sweep_is_the_torch_sweep(salient, free, remask, rows, cols, monkeypatch):
    if not descent.is_compiled():
        pytest.skip("the compiled sweep was not built")
    for seed in range(3):
        W, S, coding = problem(salient and cols > 9, free, seed, rows, cols)
        compiled = sweep(W, S, coding, 8, remask)
        monkeypatch.setenv("SUBBIT_DESCENT", "off")
        ours = sweep(W, S, coding, 8, remask)
        monkeypatch.undo()
        assert (compiled.codes == ours.codes).float().mean() > 0.99
        assert torch.allclose(objective(W, S, compiled), objective(W, S, ours), rtol=1e-2)


@pytest.mark.parametrize("remask", [False, True])
def test_a_column_in_which_nothing_counts_stays_as_it_is(either_sweep, remask):
    W, S, coding = problem(False, True)
    S[:, 3] = S[3] = 0
    S[:, 12] = S[12] = 0
    swept = sweep(W, S, coding, 8, remask)
    kept = coding.codes[:, [3, 12]] > 0
    for _ in range(2):  # nor do exchanges, which cost nothing there, put another level in
        swept = sweep(W, S, swept, 8, False)
    still = kept & (swept.codes[:, [3, 12]] > 0)
    assert still.any() or remask
    values, before = swept.values()[:, [3, 12]], coding.values()[:, [3, 12]]
    assert torch.equal(values[still], before[still])
    assert (objective(W, S, swept) < objective(W, S, coding)).all()


@pytest.mark.parametrize(("salient", "free"), CASES)
def test_the_compiled_level_solve_is_the_torch_one(salient, free, monkeypatch):
    if not descent.is_compiled():
        pytest.skip("the compiled steps were not built")
    for rows, cols in ((1, 12), (37, 128)):
        W, S, coding = problem(salient, free, 0, rows, cols)
        compiled = solve_levels(W, S, coding, 1e-3)
        monkeypatch.setenv("SUBBIT_DESCENT", "off")
        ours = solve_levels(W, S, coding, 1e-3)
        monkeypatch.undo()
        torch.testing.assert_close(compiled.params, ours.params, rtol=2e-3, atol=2e-3)
        assert not torch.allclose(coding.params, ours.params, rtol=2e-3, atol=2e-3)


def test_what_the_compiled_sweep_cannot_take_is_left_to_torch(either_sweep):
    W, S, coding = problem(False, True, rows=3, cols=300)
    before, after = objective(W, S, coding), objective(W, S, sweep(W, S, coding, 8, True))
    assert (after < before).all()


def test_threads_do_not_change_the_compiled_sweep():
    W, S, coding = problem(False, True, rows=100, cols=64)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sweep(W, S, coding, 8, True).codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_unknown_switch_is_refused(monkeypatch):
    monkeypatch.setenv("SUBBIT_DESCENT", "of")
    W, S, coding = problem(False, True)
    with pytest.raises(RecipeError, match="SUBBIT_DESCENT is 'of'; use on or off"):
        sweep(W, S, coding, 8, True)
