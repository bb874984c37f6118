"""RTN, GPTQ and AWQ: each by the property that defines it."""

import pytest
import torch
from problems import problem

from subbit.errors import RecipeError
from subbit.linalg import relative_loss
from subbit.methods import LinearStats, Settings, make_method
from subbit.packed import bit_report, pack

SETTINGS = Settings(blocksize=64)


def run(method, case="plain", settings=SETTINGS, **options):
    return make_method(method, options, settings).compress(*problem(case))


def correlated(rows=16, cols=128, seed=3):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(512, 24, generator=g) @ torch.randn(24, cols, generator=g)
    X += 0.3 * torch.randn(512, cols, generator=g)
    W = 0.05 * torch.randn(rows, cols, generator=g)
    return W, LinearStats(X.T @ X, 512, "correlated")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", ["block", "row"])
def test_rtn_takes_the_nearest_level_of_a_grid_from_min_to_max(bits, group):
    W, _ = problem("ragged")
    result = run("rtn", "ragged", bits=bits, group=group)
    assert result.levels.count == 2**bits and int(result.codes.max()) == 2**bits
    assert result.group_size == (64 if group == "block" else 92)
    levels = result.levels.values()
    dense = result.dequantize()
    for g, part in enumerate(W.split(result.group_size, 1)):
        mine = levels[:, g]
        assert torch.equal((mine == 0).sum(1), torch.ones(24, dtype=torch.int64))  # 0 is a level
        nearest = (part[..., None] - mine[:, None]).abs().amin(-1)
        found = (part - dense.split(result.group_size, 1)[g]).abs()
        assert torch.allclose(found, nearest, atol=1e-6)
        step = mine[:, 1] - mine[:, 0]
        spread = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        assert torch.allclose(step * (2**bits - 1), spread, rtol=2e-3)


def test_four_levels_worked_out_by_hand():
    W = torch.tensor([[-1.0, -0.4, 0.1, 0.9, 2.0]])
    stats = LinearStats(torch.eye(5), 1)
    result = make_method("rtn", {"bits": 2}).compress(W, stats)
    assert result.levels.params.tolist() == [[[1.0, 1.0]]]  # scale, zero
    assert result.codes.tolist() == [[1, 2, 2, 3, 4]]
    assert result.dequantize().tolist() == [[-1, 0, 0, 1, 2]]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", ["block", "row"])
def test_gptq_beats_rtn_on_correlated_inputs(bits, group):
    W, stats = correlated()
    losses = [
        make_method(name, {"bits": bits, "group": group}, SETTINGS)
        .compress(W, stats)
        .record["loss"]
        for name in ("gptq", "rtn")
    ]
    assert losses[0] < 0.5 * losses[1]


def test_gptq_is_rtn_where_inputs_are_uncorrelated():
    W, _ = problem("plain")
    stats = LinearStats(torch.diag(torch.linspace(1, 9, W.shape[1])), 10)
    for group in ("block", "row"):
        one, other = (
            make_method(m, {"bits": 2, "group": group}, SETTINGS).compress(W, stats)
            for m in ("gptq", "rtn")
        )
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.levels.params, other.levels.params)


def test_gptq_is_textbook_obq_on_a_fixed_grid():
    W, stats = problem("plain")
    W, H = W[:5, :24], stats.H[:24, :24]
    result = make_method("gptq", {"bits": 3, "group": "row"}, Settings(blocksize=8)).compress(
        W, LinearStats(H, stats.tokens)
    )
    scale, zero = result.levels.params[:, 0].double().unbind(-1)
    left = W.double().clone()
    Hinv = torch.linalg.inv(H.double() + 0.01 * H.diagonal().mean() * torch.eye(24))
    for j in range(24):
        index = (left[:, j] / scale).round().add(zero).clamp(0, 7)
        assert torch.equal(result.codes[:, j].double(), index + 1), j
        left -= ((left[:, j] - (index - zero) * scale) / Hinv[j, j])[:, None] * Hinv[j]
        Hinv = Hinv - torch.outer(Hinv[:, j], Hinv[j]) / Hinv[j, j]


def test_the_grid_of_a_later_group_sees_what_earlier_ones_left():
    assert torch.equal(run("gptq").levels.params[:, 0], run("rtn").levels.params[:, 0])
    assert not torch.equal(run("gptq").levels.params[:, 1], run("rtn").levels.params[:, 1])


def test_awq_with_one_candidate_is_rtn():
    awq, rtn = run("awq", candidates=1), run("rtn")
    assert torch.equal(awq.column_scale, torch.ones(160).half())
    assert awq.record["alpha"] == 0
    assert torch.equal(awq.codes, rtn.codes)
    assert torch.equal(awq.dequantize(), rtn.dequantize())


@pytest.mark.parametrize("case", ["plain", "ragged", "outliers", "rank_deficient", "dead_columns"])
def test_awq_is_never_worse_than_rtn(case):
    assert run("awq", case).record["loss"] <= run("rtn", case).record["loss"]


def test_awq_protects_the_columns_with_large_inputs():
    W, stats = problem("outliers")
    result = run("awq", "outliers")
    assert result.record["alpha"] > 0
    assert result.column_scale.argmin() == 40  # the largest inputs: finest levels
    assert result.record["loss"] == relative_loss(W, result.dequantize(), stats.H)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_are_those_of_gptq_files(bits):
    W = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    layout, _ = pack(
        make_method("rtn", {"bits": bits}).compress(W, LinearStats(torch.eye(1024), 1))
    )
    report = bit_report(layout)
    assert report.paper_bits == bits
    assert report.stored_bits == pytest.approx(bits + (16 + bits) / 128)
    assert report.floor_bits == pytest.approx(report.stored_bits)


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 0}, {"group": 128}])
def test_bad_options_are_refused(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        make_method("gptq", options)
