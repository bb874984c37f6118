"""Sequential and asymmetric calibration: what is seen, what the targets become."""

import copy
import gc
import weakref

import pytest
import torch

from subbit.calibration import Calibrator
from subbit.errors import ModelError, RecipeError
from subbit.linalg import PairAccumulator, shifted_target
from subbit.methods import METHODS
from subbit.model import (
    find_blocks,
    find_linears,
    first_inputs,
    record_calls,
    replace_module,
    wiring,
)
from subbit.recipe import load_recipe
from test_compression import compress
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer

NSAMPLES, SEQLEN = 3, 16
PLAIN_SUMS = ("llama", "gpt2", "opt")  # out = in + attention + mlp


def prepared(family, *overrides, dtype=torch.float32):
    model = tiny_model(family).to(dtype)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, VOCAB_SIZE, (NSAMPLES, SEQLEN), generator=generator)
    blocks = find_blocks(model)
    calls, hidden = record_calls(model, blocks, windows), first_inputs(model, blocks, windows)
    recipe = load_recipe("rtn-2").override(list(overrides))
    calibrator = Calibrator(recipe, blocks, calls, hidden, torch.device("cpu"))
    return calibrator, find_linears(blocks.modules[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_hold_every_linear_once_and_writers_add_up(family):
    calibrator, linears = prepared(family)
    block, call = calibrator.blocks.modules[0], calibrator.calls[0]
    found = wiring(block, calibrator.hidden[:1], call, linears)
    assert sorted(sum(found.groups, ())) == sorted(linears)
    if family in PLAIN_SUMS:
        assert len(found.writers) == 2
        assert found.groups[-1] == found.writers[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*PLAIN_SUMS, "gemma2"])
def test_writers_are_found_among_massive_hidden_states(family, dtype):
    """One token's hidden states dwarf all that a block adds, and their rounding with it."""
    calibrator, linears = prepared(family, dtype=dtype)
    block, call, hidden = (
        calibrator.blocks.modules[0],
        calibrator.calls[0],
        calibrator.hidden[:1],
    )
    hidden[0, 0] *= 20_000 / hidden[0, 0].abs().max()
    found = wiring(block, hidden, call, linears)
    assert len(found.writers) == (0 if family == "gemma2" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_round_sees_what_capture_sees(family):
    calibrator, linears = prepared(family)
    (plain,) = calibrator.rounds(0, linears)
    asymmetric, same = prepared(family, "asymmetry.strength=0.5", "asymmetry.linears=all")
    (pairs,) = asymmetric.rounds(0, same)
    assert pairs.keys() == plain.keys() == linears.keys()
    for name in linears:
        assert torch.allclose(pairs[name].H, plain[name].H, rtol=1e-4, atol=1e-4)
        assert pairs[name].tokens == plain[name].tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_moves_while_both_models_are_the_same(family):
    calibrator, linears = prepared(
        family, "asymmetry.strength=1", "asymmetry.linears=all", "calibration.sequential=true"
    )
    rounds = list(calibrator.rounds(0, linears))
    assert len(rounds) > 1
    for statistics in rounds:
        for name, pair in statistics.items():
            W = torch.randn(4, pair.H.shape[0], generator=torch.Generator().manual_seed(1))
            pair.D = None if pair.D is None else pair.D[:4]
            assert torch.allclose(calibrator.target(W, pair), W, atol=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_sees_the_linears_that_were_replaced_before_it(family):
    calibrator, linears = prepared(family, "calibration.sequential=true")
    untouched, originals = prepared(family, "calibration.sequential=true")
    seen = {}
    for statistics in calibrator.rounds(0, linears):
        for name in statistics:
            seen[name] = statistics[name].H
            linears[name].weight.data.mul_(0.5)
    before = {}
    for statistics in untouched.rounds(0, originals):
        before |= {name: statistics[name].H for name in statistics}
    first = next(iter(seen))
    assert torch.equal(seen[first], before[first])
    assert any(not torch.allclose(seen[name], before[name]) for name in seen)


@pytest.mark.parametrize("family", PLAIN_SUMS)
@pytest.mark.parametrize("residual", [False, True])
def test_the_full_shift_is_the_least_squares_solution(family, residual):
    calibrator, linears = prepared(
        family,
        "asymmetry.strength=1",
        "asymmetry.percdamp=1e-9",
        f"asymmetry.residual={str(residual).lower()}",
        "calibration.sequential=true",
    )
    calibrator.hidden.add_(0.1 * torch.randn(calibrator.hidden.shape))
    originals = calibrator.originals.clone()
    statistics = {}
    for found in calibrator.rounds(0, linears):
        statistics |= found
    block, call = calibrator.blocks.modules[0], calibrator.calls[0]
    writer = wiring(block, originals[:1], call, linears).writers[-1]
    run = {"x": [], "stream": []}

    def keep(module, args, out):
        run["x"].append(args[0].flatten(0, -2))
        run["y"] = out.flatten(0, -2)

    linears[writer].register_forward_hook(keep)
    streams = {}
    for key, states in (("theirs", originals), ("ours", calibrator.hidden)):
        run["x"], stream, outs = [], [], []
        for n in range(NSAMPLES):
            out = call.run(block, states[n : n + 1].clone())[0]
            outs.append(run["y"])
            stream.append(out - run["y"])
        streams[key] = torch.cat(run["x"]), torch.cat(outs), torch.cat(stream)
    X, _, ours = streams["ours"]
    _, Y, theirs = streams["theirs"]
    bias = linears[writer].bias
    Y = (Y if bias is None else Y - bias) + (theirs - ours) * residual
    weight = linears[writer].weight
    W = weight.T if type(linears[writer]).__name__ == "Conv1D" else weight
    target = calibrator.target(W.detach().float(), statistics[writer])
    X, Y = X.double(), Y.double()

    def loss(V):
        return float((X @ V.double().T - Y).square().sum())

    best = torch.linalg.lstsq(X, Y).solution.T
    assert loss(target) <= loss(W) * (1 + 1e-6)
    assert loss(target) <= loss(best) + 0.02 * (loss(W) - loss(best)) + 1e-6


def test_no_token_is_all_that_a_gap_is_about():
    """By size the gap of a token whose hidden states dwarf all others counts as any other."""
    found = {}
    for residual in ("true", "relative"):
        calibrator, linears = prepared(
            "llama",
            "asymmetry.strength=1",
            "calibration.sequential=true",
            f"asymmetry.residual={residual}",
        )
        generator = torch.Generator().manual_seed(1)
        calibrator.hidden[:, 0] *= 1000
        calibrator.originals[:, 0] *= 1000
        noise = torch.randn(calibrator.hidden.shape, generator=generator)
        calibrator.hidden.mul_(1 + 0.1 * noise)
        block, call = calibrator.blocks.modules[0], calibrator.calls[0]
        writer = wiring(block, calibrator.hidden[:1], call, linears).writers[0]
        for statistics in calibrator.rounds(0, linears):
            found[residual] = statistics.get(writer, found.get(residual))
    assert found["relative"].D.norm() < 0.02 * found["true"].D.norm()
    assert torch.equal(found["relative"].C, found["true"].C)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_gap_is_made_up_for_once(sequential):
    """Where linears do not see what those before them make up for, the first writer does it all."""
    calibrator, linears = prepared(
        "llama", "asymmetry.strength=1", f"calibration.sequential={str(sequential).lower()}"
    )
    generator = torch.Generator().manual_seed(0)
    calibrator.hidden.add_(0.1 * torch.randn(calibrator.hidden.shape, generator=generator))
    block, call = calibrator.blocks.modules[0], calibrator.calls[0]
    found = wiring(block, calibrator.hidden[:1], call, linears)
    statistics = {}
    for seen in calibrator.rounds(0, linears):
        statistics |= seen
    first, second = (statistics[name].D for name in found.writers)
    assert first is not None and (second is not None) == sequential


def test_a_linear_as_wide_as_the_hidden_states_is_no_writer_for_that():
    config = tiny_model("opt").config
    config.ffn_dim = config.hidden_size
    model = type(tiny_model("opt"))(config).eval()
    blocks = find_blocks(model)
    windows = torch.arange(SEQLEN)[None] % VOCAB_SIZE
    calls, hidden = record_calls(model, blocks, windows), first_inputs(model, blocks, windows)
    linears = find_linears(blocks.modules[0])
    found = wiring(blocks.modules[0], hidden, calls[0], linears)
    assert found.writers == ("self_attn.out_proj", "fc2")


@pytest.mark.parametrize("family", PLAIN_SUMS)
def test_the_hidden_states_before_a_writer_hold_what_replaced_the_writer_before_it(family):
    changes = ["asymmetry.strength=1", "calibration.sequential=true"]
    calibrator, linears = prepared(family, *changes)
    block, call = calibrator.blocks.modules[0], calibrator.calls[0]
    originals, seen = calibrator.originals.clone(), {}

    def keep(module, args, out):
        seen["x"], seen["y"] = args[0].flatten(0, -2), out.flatten(0, -2)

    def before(writer, states):
        x, stream = [], []
        with block.get_submodule(writer).register_forward_hook(keep):
            for n in range(NSAMPLES):
                out = call.run(block, states[n : n + 1].clone())[0]
                x.append(seen["x"])
                stream.append(out - seen["y"])
        return torch.cat(x), torch.cat(stream)

    writer = wiring(block, originals[:1], call, linears).writers[-1]
    _, theirs = before(writer, originals)
    for statistics in calibrator.rounds(0, linears):
        if writer in statistics:
            X, ours = before(writer, calibrator.hidden)
            D = (theirs - ours).T @ X
            assert torch.allclose(statistics[writer].D, D, rtol=1e-3, atol=1e-4 * D.abs().max())
        for name in statistics:  # a new module, as a packed linear is
            other = copy.deepcopy(linears[name])
            other.weight.data.mul_(0.5)
            replace_module(block, name, other)


@pytest.mark.parametrize("change", ["asymmetry.strength=0.3", "calibration.tokens=relative"])
def test_a_model_without_writers_is_refused_where_they_are_all_that_counts(change):
    calibrator, linears = prepared("gemma2", change)
    with pytest.raises(RecipeError, match="has none: it normalises"):
        next(calibrator.rounds(0, linears))
    calibrator, linears = prepared("gemma2", "asymmetry.strength=0.3", "asymmetry.linears=all")
    next(calibrator.rounds(0, linears))


def test_a_skipped_writer_still_counts_for_the_hidden_states():
    changes = ["asymmetry.strength=1", "calibration.sequential=true"]
    calibrator, linears = prepared("llama", *changes)
    *_, whole = calibrator.rounds(0, linears)
    calibrator, linears = prepared("llama", *changes)
    del linears["self_attn.o_proj"]
    rounds = list(calibrator.rounds(0, linears))
    assert [list(names) for names in rounds] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert torch.equal(rounds[-1]["mlp.down_proj"].D, whole["mlp.down_proj"].D)


def test_a_linear_that_never_runs_is_named():
    calibrator, linears = prepared("llama", "calibration.sequential=true")
    linears["spare"] = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match="never ran on the calibration text"):
        calibrator.passes(linears)


def test_the_inputs_of_one_window_are_held_at_a_time(monkeypatch):
    from subbit import calibration

    seen, real = [], calibration.look_at_windows

    def watched(*args, **kwargs):
        for look in real(*args, **kwargs):
            seen.append(weakref.ref(look))
            yield look
            gc.collect()
            assert sum(held() is not None for held in seen) <= 4

    monkeypatch.setattr(calibration, "look_at_windows", watched)
    calibrator, linears = prepared(
        "llama", "asymmetry.strength=1", "asymmetry.linears=all", "calibration.sequential=true"
    )
    list(calibrator.rounds(0, linears))
    assert len(seen) == 8 * NSAMPLES == calibrator.passes(linears) * NSAMPLES


def test_targets_of_nothing_are_the_weights():
    pair = PairAccumulator(4)
    W = torch.ones(3, 4)
    assert torch.equal(shifted_target(W, pair, 1.0, 0.01), W)
    pair.add_pair(torch.zeros(5, 4), torch.ones(5, 4))
    assert torch.equal(shifted_target(W, pair, 1.0, 0.01), W)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_original_states_follow_the_original_model(family):
    calibrator, linears = prepared(family, "asymmetry.strength=0.5")
    block = copy.deepcopy(calibrator.blocks.modules[0])
    expected = torch.stack(
        [calibrator.calls[0].run(block, x[None].clone())[0] for x in calibrator.originals]
    )
    list(calibrator.rounds(0, linears))
    assert torch.allclose(calibrator.originals, expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_relative_tokens_weigh_the_writers_alone(family):
    plain, linears = prepared(family)
    (equal,) = plain.rounds(0, linears)
    calibrator, linears = prepared(family, "calibration.tokens=relative")
    (relative,) = calibrator.rounds(0, linears)
    block, call = calibrator.blocks.modules[0], calibrator.calls[0]
    writers = wiring(block, calibrator.hidden[:1], call, linears).writers
    for name in linears:
        same = torch.allclose(relative[name].H, equal[name].H, rtol=1e-4, atol=1e-4)
        assert same != (name in writers), name
    name, x = writers[0], []
    linears[name].register_forward_pre_hook(lambda module, args: x.append(args[0].flatten(0, -2)))
    for states in calibrator.hidden:
        call.run(block, states[None].clone())
    square = calibrator.hidden.square().mean(-1)
    square = torch.maximum(square, 0.1 * square.median(-1, keepdim=True).values)
    X = torch.cat(x)
    weighted = X / square.flatten()[:, None]
    assert torch.allclose(relative[name].H, weighted.T @ X, rtol=1e-3, atol=1e-4)


def test_the_first_token_counts_what_it_is_told_to():
    plain, linears = prepared("llama")
    (equal,) = plain.rounds(0, linears)
    calibrator, linears = prepared("llama", "calibration.first_token=5")
    inputs = {name: [] for name in linears}
    for name in linears:
        linears[name].register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0][0, 0].clone())
        )
    (heavy,) = calibrator.rounds(0, linears)
    for name in linears:
        first = torch.stack(inputs[name][-NSAMPLES:]) if inputs[name] else None
        expected = equal[name].H + 4 * first.T @ first
        assert torch.allclose(heavy[name].H, expected, rtol=1e-3, atol=1e-4), name


def test_gradients_weigh_tokens():
    calibrator, linears = prepared("llama", "calibration.sequential=true")
    seen = [round_ for round_ in calibrator.rounds(0, linears)]
    rng = torch.Generator().manual_seed(1)
    matters = {name: torch.rand(NSAMPLES, SEQLEN, generator=rng) for name in linears}
    weighted, same = prepared("llama", "calibration.sequential=true")
    weighted.gradients = [matters] * 3
    for plain, round_ in zip(seen, weighted.rounds(0, same), strict=True):
        for name in round_:
            assert not torch.allclose(plain[name].H, round_[name].H)
    name = list(round_)[-1]  # reads an input of its own
    weighted.gradients = [{key: torch.full_like(matters[key], 3.0) for key in matters}] * 3
    *_, last = weighted.rounds(0, same)
    assert torch.allclose(last[name].H, plain[name].H, rtol=1e-5, atol=1e-5)  # equal: mean 1
    only = torch.zeros(NSAMPLES, SEQLEN)
    only[1, 5] = 1
    weighted.gradients = [dict.fromkeys(matters, only)] * 3
    *_, last = weighted.rounds(0, same)
    assert torch.linalg.matrix_rank(last[name].H) == 1


def test_methods_are_told_what_the_tokens_count_together(text, monkeypatch):
    told = []
    plain = METHODS["wanda"].compress

    def compress_and_tell(self, W, stats, nm):
        told.append(stats)
        return plain(self, W, stats, nm)

    monkeypatch.setattr(METHODS["wanda"], "compress", compress_and_tell)
    compress(
        tiny_model("llama"),
        text,
        "wanda-4-8",
        tokenizer=tiny_tokenizer(),
        overrides=["calibration.first_token=20"],
    )
    assert told
    for stats in told:
        windows = (stats.weight - stats.tokens) / 19
        assert windows >= 1 and windows == int(windows) and stats.tokens % windows == 0
