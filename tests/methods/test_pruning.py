"""The methods that only prune: each by the property that defines it."""

import pytest
import torch
from problems import PROBLEMS, problem

from subbit.errors import ModelError, RecipeError
from subbit.linalg import GramAccumulator, relative_loss
from subbit.methods import LinearStats, Settings, make_method
from subbit.methods.dsnot import reselect
from subbit.packed import bit_report, pack

SETTINGS = Settings(blocksize=64)
TYPES = ["semi-structured", "unstructured", "structured"]


def run(method, case="plain", nm=(4, 8), settings=SETTINGS, **options):
    return make_method(method, options, settings).compress(*problem(case), nm)


def loss(*args, **kwargs):
    return run(*args, **kwargs).record["loss"]


@pytest.mark.parametrize("pruning", TYPES)
def test_the_order_of_the_papers(pruning):
    names = ["alps", "sparsegpt", "wanda", "random"]
    losses = [loss(name, pruning=pruning) for name in names]
    assert losses == sorted(losses)
    if pruning != "structured":
        assert loss("wanda", pruning=pruning) < loss("magnitude", pruning=pruning)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_freer_masks_lose_less(method):
    semi, free, columns = (loss(method, pruning=pruning) for pruning in TYPES)
    assert free < semi < columns


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_more_kept_weights_lose_less(method):
    losses = [loss(method, nm=(n, 8)) for n in (2, 4, 6, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "dsnot"])
def test_weights_that_are_kept_stay_as_they_are(method):
    W, stats = problem("plain")
    for dtype in (torch.float16, torch.bfloat16):
        exact = W.to(dtype).float()
        result = make_method(method, {}, SETTINGS).compress(exact, stats, (4, 8))
        assert torch.equal(result.dequantize(), exact * result.mask)


def test_weights_too_large_for_float16_are_kept_in_bfloat16():
    W, stats = problem("plain")
    result = make_method("wanda", {}, SETTINGS).compress(W * 1e8, stats, (4, 8))
    assert result.values.dtype == torch.bfloat16
    assert result.record["loss"] == pytest.approx(loss("wanda"), rel=1e-2)


def test_magnitude_and_wanda_keep_the_largest_scores():
    W, stats = problem("plain")
    for method, score in (
        ("magnitude", W.abs()),
        ("wanda", W.abs() * stats.H.diagonal().sqrt()),
    ):
        mask = run(method).mask
        kept = score.masked_fill(~mask, torch.inf).view(24, -1, 8).amin(-1)
        pruned = score.masked_fill(mask, -torch.inf).view(24, -1, 8).amax(-1)
        assert (kept >= pruned).all()
    whole = run("magnitude", pruning="unstructured").mask
    assert W.abs()[whole].min() >= W.abs()[~whole].max()
    assert len(whole.sum(1).unique()) > 1
    assert (run("wanda", pruning="unstructured").mask.sum(1) == 80).all()


def test_random_depends_on_the_seed_and_the_name():
    W, stats = problem("plain")

    def mask(seed=0, name="a"):
        maker = make_method("random", {}, Settings(seed=seed))
        return maker.compress(W, LinearStats(stats.H, 1, name), (4, 8)).mask

    assert torch.equal(mask(), mask())
    assert not torch.equal(mask(), mask(seed=1))
    assert not torch.equal(mask(), mask(name="b"))


def test_sparsegpt_is_textbook_obs_in_the_given_order():
    W, stats = problem("plain")
    W, H = W[:5, :24], stats.H[:24, :24]
    found = make_method("sparsegpt", {}, Settings(blocksize=8)).compress(
        W, LinearStats(H, stats.tokens), (2, 4)
    )
    left = W.double().clone()
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(24)
    pruned = torch.zeros(5, 24, dtype=torch.bool)
    for j in range(24):
        Hinv = torch.linalg.inv(damped[j:, j:])  # of the columns that are left
        if j % 4 == 0:
            U = torch.linalg.cholesky(Hinv, upper=True).diagonal()[:4]
            score = (left[:, j : j + 4] / U).square()
            pruned[:, j : j + 4] = score.argsort(-1).argsort(-1) < 2
        error = left[:, j] * pruned[:, j]
        left[:, j:] -= (error / Hinv[0, 0])[:, None] * Hinv[0]
    assert torch.equal(found.mask, ~pruned)
    assert torch.allclose(found.dequantize().double(), left * ~pruned, atol=1e-4)


def test_sparsegpt_chooses_on_compensated_weights():
    W, stats = problem("plain")
    fixed = make_method("dsnot", {"start": "sparsegpt", "cycles": 0}, SETTINGS)
    assert not torch.equal(run("sparsegpt").mask, fixed.compress(W, stats, (4, 8)).mask)
    # the first group of eight has seen no compensation yet
    first = fixed.compress(W, stats, (4, 8)).mask[:, :8]
    assert torch.equal(run("sparsegpt").mask[:, :8], first)


def test_alps_refits_the_weights_of_its_mask():
    W, stats = problem("plain")
    rough, fine = run("alps", cg_steps=0), run("alps")
    assert torch.equal(rough.mask, fine.mask)
    assert fine.record["loss"] < rough.record["loss"]
    assert fine.record["residual"] < 0.01
    assert fine.record["iterations"] < 300
    once = run("alps", iterations=1)
    assert fine.record["loss"] < once.record["loss"]
    assert once.record["residual"] > fine.record["residual"]
    assert fine.record["loss"] == relative_loss(W, fine.dequantize(), stats.H)


def shifted(seed=0):
    """Inputs whose means are not 0: what DSnoT is for."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, 64, generator=g) + 2 * torch.randn(64, generator=g)
    W = torch.randn(16, 64, generator=g)
    return W, LinearStats(X.T @ X, 300, "shifted", X.mean(0))


@pytest.mark.parametrize("pruning", ["semi-structured", "unstructured"])
@pytest.mark.parametrize("start", ["wanda", "sparsegpt"])
def test_dsnot_lowers_the_mean_error_of_every_row_that_it_changes(start, pruning):
    W, stats = shifted()

    def mask(cycles):
        maker = make_method("dsnot", {"start": start, "pruning": pruning, "cycles": cycles})
        return maker.compress(W, stats, (4, 8))

    before, after = mask(0), mask(50)
    errors = [(W * stats.mean * ~result.mask).sum(1).abs() for result in (before, after)]
    changed = (before.mask != after.mask).any(1)
    assert changed.any() and after.record["swaps"] > 0 == before.record["swaps"]
    assert (errors[1] <= errors[0]).all()
    assert (errors[1][changed] < errors[0][changed]).all()
    assert errors[1].sum() < 0.5 * errors[0].sum()
    assert after.record["loss"] < before.record["loss"]


def test_dsnot_errors_fall_with_every_cycle_and_keep_their_sign():
    W, stats = shifted()
    effect, score = W * stats.mean, W.abs()
    start = make_method("wanda").compress(W, stats, (4, 8)).mask
    last = (effect * ~start).sum(1)
    for cycles in range(1, 30):
        swaps = reselect(effect, score, torch.ones(64), start, 8, cycles=cycles, threshold=0.0)
        error = (effect * ~swaps.mask).sum(1)
        assert (error.abs() <= last.abs() + 1e-5).all()
        assert (error.sign() == last.sign()).all()
        last = error


def test_dsnot_leaves_small_errors_alone():
    W, stats = shifted()
    still = make_method("dsnot", {"threshold": 1e9}).compress(W, stats, (4, 8))
    assert still.record["swaps"] == 0
    assert torch.equal(still.mask, make_method("wanda").compress(W, stats, (4, 8)).mask)


def test_dsnot_of_weighed_tokens_is_that_of_repeated_ones():
    W, X = PROBLEMS["plain"]()
    X = X + 0.3 * X.std(0) * torch.linspace(-1, 1, X.shape[1])
    weight = 1 + torch.arange(len(X)) % 20
    seen = GramAccumulator(X.shape[1])
    seen.add(X, weight.float())
    mean, total = seen.mean, seen.weight
    repeated = LinearStats(seen.H, int(total), mean=mean)
    weighed = LinearStats(seen.H, seen.tokens, mean=mean, weight=total)
    one, other = (make_method("dsnot").compress(W, s, (4, 8)) for s in (repeated, weighed))
    assert torch.equal(one.mask, other.mask) and one.record["swaps"] > 0


def test_dsnot_needs_the_mean_input():
    W, stats = problem("plain")
    with pytest.raises(ModelError, match=r"test\.plain: dsnot needs the mean"):
        make_method("dsnot").compress(W, LinearStats(stats.H, 3, "test.plain"), (4, 8))


@pytest.mark.parametrize("pruning", TYPES)
def test_bits(pruning):
    report = bit_report(pack(run("wanda", nm=(6, 8), pruning=pruning))[0])
    assert report.paper_bits == pytest.approx(12)
    mask = {"semi-structured": 13 / 20, "unstructured": 1, "structured": 1 / 24}[pruning]
    assert report.stored_bits == pytest.approx(12 + mask)
    assert report.floor_bits <= report.stored_bits


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("wanda", {"pruning": "structurd"}, "pruning"),
        ("dsnot", {"pruning": "structured"}, "pruning"),
        ("dsnot", {"start": "alps"}, "start"),
        ("alps", {"rho": 0}, "rho"),
        ("sparsegpt", {"prunning": 1}, "did you mean 'pruning'"),
    ],
)
def test_bad_options_are_refused(method, options, words):
    with pytest.raises(RecipeError, match=words):
        make_method(method, options)
