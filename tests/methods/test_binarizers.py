"""Every option of XNOR, PB-LLM, BiLLM, ARB-LLM and STBLLM does what it says, or this fails."""

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.errors import RecipeError
from subbit.methods import LinearStats, Settings, make_method
from subbit.packed.pack import pack, unpack

SETTINGS = Settings(blocksize=64)
GROUPED = ("billm", "arb", "stbllm")


def run(method, nm=None, name="plain", **options):
    W, stats = problem(name)
    return make_method(method, options, SETTINGS).compress(W, stats, nm)


def loss(method, nm=None, **options):
    return run(method, nm, **options).record["loss"]


def test_the_order_of_the_methods():
    assert loss("arb") < loss("billm") < loss("xnor")
    assert loss("stbllm") < loss("billm")  # three groups instead of two
    assert loss("arb", variant="arb-x") < loss("arb")
    assert loss("stbllm", search="naive") != loss("stbllm")


@pytest.mark.parametrize("variant", ["arb", "arb-x", "arb-rc"])
def test_a_second_salient_group_helps(variant):
    assert loss("arb", variant=variant, cgb=True) < loss("arb", variant=variant)


@pytest.mark.parametrize("method", ["billm", "stbllm"])
def test_more_kept_weights_lose_less(method):
    losses = [loss(method, (n, 8)) for n in (2, 4, 6)]
    assert losses == sorted(losses, reverse=True)


def test_pruning_first_and_pruning_last():
    assert loss("stbllm", (4, 8)) < loss("stbllm", (4, 8), order="quantise-then-prune")
    assert loss("billm", (4, 8), mask_first=False) < loss("billm", (4, 8))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("billm", {"mask_first": False}),
        ("arb", {}),
        ("arb", {"variant": "arb-rc"}),
        ("stbllm", {"fine_metric": "hessian"}),
    ],
)
def test_freer_masks_lose_less(method, options):
    results = [
        run(method, (4, 8), pruning=pruning, **options)
        for pruning in ("unstructured", "semi-structured", "structured")
    ]
    losses = [result.record["loss"] for result in results]
    assert losses == sorted(losses)
    for result in results:
        assert float(result.kept.float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pruning", ["unstructured", "structured"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("billm", {}), ("stbllm", {"order": "quantise-then-prune"})],
)
def test_other_types_of_pruning_before_and_after(method, options, pruning):
    result = run(method, (4, 8), pruning=pruning, **options)
    assert result.nm is None and result.structured == (pruning == "structured")
    assert float(result.kept.float().mean()) == pytest.approx(0.5)
    assert result.structured == bool((result.kept == result.kept[:1]).all())


@pytest.mark.parametrize("method", GROUPED)
def test_more_split_points_lose_less(method):
    """STBLLM Table 15, and Table 3f of the earlier version of PBS2P."""
    losses = [loss(method, (6, 8), split_points=n, split_grid=(0.1, 0.9, 160)) for n in (0, 1, 2)]
    assert losses == sorted(losses, reverse=True)
    result = run(method, (6, 8), split_points=3)
    assert result.levels.groups == 4


@pytest.mark.parametrize("nm", [(4, 8), (2, 4), (8, 8)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("billm", {}),
        ("billm", {"mask_first": False}),
        ("arb", {"variant": "arb-rc", "cgb": True}),
        ("stbllm", {}),
        ("stbllm", {"order": "quantise-then-prune"}),
    ],
)
def test_n_of_m_is_exact(method, options, nm):
    result = run(method, nm, "ragged", **options)
    assert result.nm == nm
    for start in range(0, 92, nm[1]):
        group = result.codes[:, start : start + nm[1]] != 0
        assert (group.sum(1) == min(nm[0], group.shape[1])).all()


@pytest.mark.parametrize("method", ["billm", "stbllm"])
def test_published_quantisers_fill_pruned_weights_in_again(method):
    result = run(method, (4, 8), published=True)
    assert result.nm is None and bool((result.codes != 0).all())
    assert not torch.equal(result.dequantize(), run(method, published=True).dequantize())


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("xnor", {"mean": True}),
        ("xnor", {"group_size": 32}),
        ("xnor", {"group_size": None}),
        ("pb-llm", {"fine_metric": "magnitude"}),
        ("pb-llm", {"salient_share": 0.2}),
        ("arb", {"iterations": 3}),
        *((method, {"split_points": 3}) for method in GROUPED),
        *((method, {"split_points": 0}) for method in GROUPED),
        ("billm", {"split_points": 2}),
        ("stbllm", {"sigma": 1.5}),
        ("stbllm", {"search": "naive"}),
        *((method, {"published": True}) for method in GROUPED),
        *((method, {"salient_max": 2}) for method in GROUPED),
        *((method, {"split_grid": (0.3, 0.4, 5)}) for method in GROUPED),
    ],
    ids=str,
)
def test_every_option_changes_the_result(method, option):
    assert not torch.equal(run(method).dequantize(), run(method, **option).dequantize())


@pytest.mark.parametrize("method", GROUPED)
def test_the_fine_metric_chooses_the_mask(method):
    metrics = ("hessian", "wanda", "magnitude", "si", "ria", "random")
    masks = [run(method, (4, 8), fine_metric=metric).codes != 0 for metric in metrics]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(metrics)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("nm", [None, (4, 8)])
@pytest.mark.parametrize("method", GROUPED)
def test_without_salient_columns(method, nm, published, name):
    result = run(method, nm, name, published=published, salient_max=0)
    assert result.salient is None and torch.isfinite(result.dequantize()).all()
    assert torch.equal(unpack(*pack(result)).dequantize(), result.dequantize())


@pytest.mark.parametrize(
    ("options", "ordinary", "salient"),
    [
        ({"variant": "arb"}, ("pairs", 2), ("residual", 1)),
        ({"variant": "arb-x", "cgb": True}, ("pairs", 2), ("residual", 2)),
        ({"variant": "arb-rc"}, ("symmetric", 2), ("symmetric_residual", 1)),
        ({"variant": "arb-rc", "cgb": True}, ("symmetric", 2), ("symmetric_residual", 2)),
    ],
    ids=str,
)
def test_levels_of_the_variants(options, ordinary, salient):
    result = run("arb", **options)
    assert (result.levels.kind, result.levels.groups) == ordinary
    assert (result.salient_levels.kind, result.salient_levels.groups) == salient
    scales = {"arb-rc": 4 if options.get("cgb") else 2}.get(options["variant"])
    assert (None if result.column_scale is None else len(result.column_scale)) == scales
    assert torch.equal(unpack(*pack(result)).dequantize(), result.dequantize())


def test_levels_as_printed_have_no_mean():
    for method in ("billm", "stbllm"):
        assert run(method).levels.kind == "symmetric"
        assert run(method, published=True).levels.kind == "pairs"


def test_xnor_is_the_mean_magnitude():
    W, _ = problem("ragged")
    result = run("xnor", name="ragged", group_size=64)
    for columns in (slice(0, 64), slice(64, 92)):
        part = W[:, columns]
        alpha = part.abs().mean(1, keepdim=True)
        expected = torch.where(part >= 0, alpha, -alpha)
        assert torch.allclose(result.dequantize()[:, columns], expected, rtol=1e-3)
    assert run("xnor", group_size=None).levels.params.shape[1] == 1


def test_pb_llm_keeps_a_share_in_eight_bits():
    W, _ = problem("plain")
    result = run("pb-llm", fine_metric="magnitude")
    assert int(result.salient.sum()) == round(0.1 * W.numel())
    assert W.abs()[result.salient].min() >= W.abs()[~result.salient].max()
    assert result.codes[~result.salient].max() == 2
    assert result.salient_levels.count == 255
    assert run("pb-llm", salient_share=0.0).salient is None
    assert loss("pb-llm", salient_share=0.3) < loss("pb-llm") < loss("pb-llm", salient_share=0)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("stbllm", {"sigma": 1.0}, "sigma"),
        ("stbllm", {"serach": "naive"}, "did you mean 'search'"),
        ("arb", {"variant": "arb-z"}, "variant"),
        ("billm", {"fine_metric": "wnada"}, "fine_metric"),
        ("pb-llm", {"salient_share": 1}, "salient_share"),
        ("xnor", {"group_size": 0}, "group_size"),
    ],
)
def test_bad_options_are_refused(method, options, words):
    with pytest.raises(RecipeError, match=words):
        make_method(method, options)


def test_a_type_of_pruning_without_a_share_is_refused():
    with pytest.raises(RecipeError, match=r"'billm' with pruning structured.*give it nm"):
        run("billm", pruning="structured")


def test_methods_that_do_not_prune_say_so():
    for method in ("xnor", "pb-llm"):
        with pytest.raises(RecipeError, match=f"{method}.*nm: null"):
            run(method, (4, 8))


@pytest.mark.parametrize(
    ("method", "with_dead", "without"),
    [
        ("billm", {"salient_max": 10}, {"salient_max": 20}),
        ("stbllm", {"salient_max": 10}, {"salient_max": 20}),
        ("arb", {"salient_max": 10}, {"salient_max": 20}),
        ("pb-llm", {"salient_share": 0.05}, {"salient_share": 0.1}),
        ("pbs2p", {"salient_max": 10}, {"salient_max": 20}),
        ("pbs2p", {"salient_max": 10, "spbo": False}, {"salient_max": 20, "spbo": False}),
    ],
)
def test_columns_without_input_take_nothing_from_the_scales_of_others(method, with_dead, without):
    W, stats = problem("plain")
    rows, cols = W.shape
    wide, H = torch.zeros(rows, 2 * cols), torch.zeros(2 * cols, 2 * cols)
    wide[:, ::2], wide[:, 1::2], H[::2, ::2] = W, W.flip(1), stats.H
    settings = Settings(blocksize=128, percdamp=0.02)  # of half the mean diagonal
    nm = (8, 8) if method == "pbs2p" else None
    found = make_method(method, with_dead, settings).compress(
        wide, LinearStats(H, stats.tokens, mean=torch.zeros(2 * cols)), nm
    )
    alone = make_method(method, without, SETTINGS).compress(W, stats, nm)
    assert found.record["loss"] == pytest.approx(alone.record["loss"], rel=0.02)


@pytest.mark.parametrize(
    "grid", [[0.1, 0.9, 0], [0.1, 0.9, -3], [2, 9, 9], [-5, -1, 9], [0.9, 0.1, 9], [0.1, 0.9, 1]]
)
@pytest.mark.parametrize("method", ["billm", "stbllm", "pbs2p"])
def test_a_grid_of_split_points_that_means_nothing(method, grid):
    with pytest.raises(RecipeError, match=r"split_grid.*0 < first <= last <= 1"):
        make_method(method, {"split_grid": grid}, SETTINGS)
