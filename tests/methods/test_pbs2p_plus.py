"""Every ingredient of pbs2p-plus pays, and with all of them off it is pbs2p."""

import itertools
from dataclasses import replace

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.errors import ModelError, NonFiniteError, RecipeError
from subbit.methods import Settings, make_method
from subbit.packed.pack import pack, unpack

SETTINGS = Settings(blocksize=64)
OFF = {
    "codebook": "groups",
    "sweeps": 0,
    "passes": 0,
    "compensation": "diagonal",
    "objective": "gram",
}


def run(nm=(6, 8), name="plain", method="pbs2p-plus", **options):
    W, stats = problem(name)
    return make_method(method, options, SETTINGS).compress(W, stats, nm)


@pytest.mark.parametrize("name", PROBLEMS)
def test_with_everything_off_it_is_pbs2p(name):
    plain, off = run(name=name, method="pbs2p"), run(name=name, **OFF)
    assert torch.equal(plain.codes, off.codes)
    assert torch.equal(plain.levels.params, off.levels.params)
    assert plain.record == off.record


@pytest.mark.parametrize("pruning", ["unstructured", "structured"])
def test_with_everything_off_it_is_pbs2p_whatever_is_pruned(pruning):
    plain, off = run(method="pbs2p", pruning=pruning), run(pruning=pruning, **OFF)
    assert torch.equal(plain.codes, off.codes) and plain.structured == off.structured
    assert plain.record == off.record


@pytest.mark.parametrize("nm", [(6, 8), (4, 8)])
def test_the_ablation_table_goes_down(nm):
    rows = [
        OFF,
        OFF | {"compensation": "exact"},
        OFF | {"compensation": "exact", "sweeps": 3, "remask": False},
        {"sweeps": 6, "remask": False, "passes": 0},
        {"sweeps": 6, "remask": True, "passes": 0},
        {},
    ]
    losses = [run(nm=nm, **row).record["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["plain", "rank_deficient"])
def test_every_option_changes_the_result(name):
    first = run(name=name).dequantize()
    for option in (
        {"codebook": "groups"},
        {"free_levels": 5},
        {"sweeps": 2},
        {"remask": False},
        {"passes": 0},
        {"objective": "gram"},
        {"compensation": "diagonal"},
    ):
        assert not torch.equal(first, run(name=name, **option).dequantize()), option


def test_free_levels_are_stored_without_salient_columns():
    result = run()
    assert (result.levels.kind, result.levels.count) == ("free", 6)
    assert result.salient is None
    assert run(free_levels=4).levels.count == 4


def test_more_passes_never_hurt():
    losses = [run(passes=passes).record["loss"] for passes in (0, 1, 2, 4)]
    for before, after in itertools.pairwise(losses):
        assert after <= before * 1.002  # float16 levels and damping
    assert losses[-1] < losses[0]


LEAN = [("binary", 6), ("free", 2), ("ternary", 6), ("free", 3), ("free", 4), ("free", 8)]


@pytest.mark.parametrize("nm", [None, (5, 8)])
def test_richer_codebooks_lose_less(nm):
    losses = {}
    for codebook, count in LEAN:
        result = run(nm=nm, codebook=codebook, free_levels=count)
        losses[codebook, count] = result.record["loss"]
        assert result.nm == nm
        if nm is None:
            assert int(result.codes.min()) == 1
        else:
            groups = (result.codes > 0).view(len(result.codes), -1, 8)
            assert (groups.sum(-1) == 5).all()
    for poorer, richer in (
        (("binary", 6), ("free", 2)),
        (("binary", 6), ("ternary", 6)),
        (("ternary", 6), ("free", 3)),
        (("free", 3), ("free", 4)),
        (("free", 4), ("free", 8)),
    ):
        assert losses[richer] < losses[poorer] * 1.02, (poorer, richer, losses)


@pytest.mark.parametrize(
    ("codebook", "nm", "bits"),
    [
        ("binary", None, 1 + 16 / 64),
        ("binary", (5, 8), 11 / 8 + 16 / 64),
        ("ternary", None, 8 / 5 + 16 / 64),
    ],
)
def test_stored_bits_of_lean_codebooks(codebook, nm, bits):
    layout, tensors = pack(run(nm=nm, codebook=codebook))
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored / (layout.rows * layout.cols) == pytest.approx(
        bits, rel=0.06
    )  # the last block is short
    assert torch.equal(unpack(layout, tensors).codes, run(nm=nm, codebook=codebook).codes)


def test_ternary_levels_are_symmetric_about_zero():
    values = run(nm=None, codebook="ternary").levels.values()
    assert torch.equal(values, -values.flip(-1))
    assert (values[..., 2] > 0).all()


def felt(W):
    """Gradients of which neighbouring outputs feel much the same."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(300, len(W), generator=generator)
    g = g + 2 * g.roll(1, 1) + g.roll(2, 1)
    return g.T @ g


def output_loss(W, result, stats, G):
    E = W - result.dequantize()
    return float((G @ E @ stats.H * E).sum())


@pytest.mark.parametrize("levels", ["fp16", "int8", "int8-row"])
@pytest.mark.parametrize("codebook", ["free", "ternary", "binary"])
def test_rows_make_up_for_each_other(levels, codebook):
    W, stats = problem("plain")
    G = felt(W)
    method = make_method("pbs2p-plus", {"codebook": codebook}, replace(SETTINGS, levels=levels))
    alone = method.compress(W, stats, (6, 8))
    together = method.compress(W, replace(stats, G=G), (6, 8))
    assert output_loss(W, together, stats, G) < 0.8 * output_loss(W, alone, stats, G)
    layout, tensors = pack(together)
    assert torch.equal(unpack(layout, tensors).dequantize(), together.dequantize())
    again = method.compress(W, replace(stats, G=G), (6, 8))
    assert torch.equal(again.codes, together.codes) and again.record == together.record


def test_groups_and_damping_of_rows_change_the_result():
    W, stats = problem("plain")
    with_G = replace(stats, G=felt(W))

    def codes(stats, **options):
        return make_method("pbs2p-plus", options, SETTINGS).compress(W, stats, (6, 8)).codes

    usual = codes(with_G)
    assert torch.equal(codes(with_G, row_groups=1), codes(stats))
    assert not torch.equal(codes(with_G, row_groups=4), usual)
    assert not torch.equal(codes(with_G, row_percdamp=10.0), usual)
    kept = codes(with_G, fine_metric="random", remask=False, passes=0) != 0
    assert not torch.equal(kept[0], kept[1])  # of two groups: each draws its own mask


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_in_groups_whatever_the_linear(name):
    W, stats = problem(name)
    method = make_method("pbs2p-plus", {}, replace(SETTINGS, levels="int8"))
    result = method.compress(W, replace(stats, G=felt(W)), (6, 8))
    assert result.shape == W.shape and torch.isfinite(result.dequantize()).all()
    layout, tensors = pack(result)
    assert torch.equal(unpack(layout, tensors).codes, result.codes)


def test_gradients_that_do_nothing_are_refused():
    W, stats = problem("plain")
    with_G = replace(stats, G=felt(W))
    for options, word in (({"codebook": "groups"}, "groups"), ({"pruning": "structured"}, "str")):
        with pytest.raises(RecipeError, match=word):
            make_method("pbs2p-plus", options, SETTINGS).compress(W, with_G, (6, 8))
    with pytest.raises(ModelError, match="G"):
        make_method("pbs2p-plus", {}, SETTINGS).compress(W, replace(stats, G=stats.H), (6, 8))
    bad = replace(stats, G=felt(W) * float("nan"))
    with pytest.raises(NonFiniteError, match="gradients"):
        make_method("pbs2p-plus", {}, SETTINGS).compress(W, bad, (6, 8))
