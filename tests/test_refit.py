"""Refitting: levels, norms and biases move, codes stay, the block's error falls."""

import copy
import gc
import weakref

import pytest
import torch

from subbit.hub.quantizer import packed_modules
from subbit.model import (
    Blocks,
    ModelEnd,
    find_blocks,
    find_linears,
    first_inputs,
    record_calls,
    run_block,
)
from subbit.recipe import RefitSpec
from subbit.refit import loose_tensors, refit_block
from subbit.refit.adam import Adam
from subbit.refit.model import _Job
from subbit.refit.tuned import Learner
from subbit.text import calibration_windows
from test_compression import SMALL, compress, logits
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

REFIT = ["refit.steps=12", "refit.rate=0.02"]


def fitted(family, source, *overrides, recipe="pbs2p-plus-4-8", **kwargs):
    return compress(
        tiny_model(family),
        source,
        recipe,
        tokenizer=tiny_tokenizer(),
        overrides=[*REFIT, *overrides],
        **kwargs,
    )


def refit_lines(done):
    return [line for line in done.log if "refit" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_every_block_falls_and_codes_stay(family, text):
    done = fitted(family, text)
    lines = refit_lines(done)
    assert len(lines) == len({line["name"] for line in lines}) > 1
    assert all(line["refit"]["after"] <= line["refit"]["before"] for line in lines)
    assert any(line["refit"]["after"] < 0.95 * line["refit"]["before"] for line in lines)
    plain = fitted(family, text, "refit.steps=0")
    assert refit_lines(plain) == []
    ours, before = packed_modules(done.model), packed_modules(plain.model)
    first = next(iter(ours))  # of the first block, whose calibration refitting does not change
    assert torch.equal(ours[first].compressed().codes, before[first].compressed().codes)
    assert not torch.equal(ours[first].levels, before[first].levels)
    assert ours[first].levels.dtype == before[first].levels.dtype


@pytest.mark.parametrize("towards", ["original", "block"])
def test_vectors_learn_and_nothing_else_does(towards, text):
    done = fitted("llama", text, f"refit.towards={towards}")
    dense = {name: p for name, p in tiny_model("llama").named_parameters()}
    for name, parameter in done.model.named_parameters():
        if name not in dense:
            continue
        learns = ".layers." in name and parameter.dim() == 1
        assert torch.equal(parameter, dense[name]) != learns, name
        assert not parameter.requires_grad and parameter.grad is None


def test_both_ways_to_reconstruct_differ(text):
    original, block = (
        fitted("llama", text, f"refit.towards={way}") for way in ("original", "block")
    )
    assert not torch.equal(logits(original.model), logits(block.model))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("pbs2p-4-8", []),
        ("pbs2p-plus-4-8", ["levels=int8"]),
        ("pbs2p-4-8", ["levels=int8"]),
        ("pbs2p-plus-4-8", ["levels=int8-row"]),
        ("gptq-2", []),
        ("arb-rc", []),
        ("pb-llm", []),
        ("wanda-4-8", []),
    ],
)
def test_every_kind_of_result_can_be_refitted_and_saved(recipe, overrides, text, tmp_path):
    from subbit.hub.load import load

    done = fitted("llama", text, *overrides, recipe=recipe, out=tmp_path / "out")
    assert any(line["refit"]["after"] < line["refit"]["before"] for line in refit_lines(done))
    loaded = load(tmp_path / "out", backend="reference")
    assert torch.equal(logits(loaded), logits(done.model))


def test_an_interrupted_refit_resumes_to_the_same_bytes(text, tmp_path, monkeypatch):
    from subbit import job

    model = tiny_model("gpt2")  # has biases, inside its linears and outside
    whole = compress(copy.deepcopy(model), text, tokenizer=tiny_tokenizer(), overrides=REFIT)
    real, calls = job.refit_block, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "refit_block", second_fails)
    out = tmp_path / "out"
    kwargs = {"tokenizer": tiny_tokenizer(), "overrides": REFIT, "out": out}
    with pytest.raises(KeyboardInterrupt):
        compress(copy.deepcopy(model), text, **kwargs)
    monkeypatch.setattr(job, "refit_block", real)
    resumed = compress(copy.deepcopy(model), text, resume="required", **kwargs)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(refit_lines(resumed)) == len(refit_lines(whole))


def test_a_step_that_makes_it_worse_is_taken_back(text):
    done = fitted("llama", text, "refit.rate=1000")
    plain = fitted("llama", text, "refit.steps=0")
    assert all(line["refit"]["after"] == line["refit"]["before"] for line in refit_lines(done))
    assert torch.equal(logits(done.model), logits(plain.model))


MODEL = ["refit.steps=0", "refit.model_steps=16", "refit.model_rate=0.004"]


def windows(family, source, **kwargs):
    """The calibration windows of `fitted`."""
    sizes = dict(item.removeprefix("calibration.").split("=") for item in SMALL)
    counts = {key: int(sizes[key]) for key in ("nsamples", "seqlen")}
    model = tiny_model(family)
    return calibration_windows(source, tiny_tokenizer(), model, **counts, **kwargs).tokens


def divergence(model, other, tokens):
    """Mean KL divergence of `model`'s next-token distribution from that of `other`."""
    given, wanted = (m(input_ids=tokens).logits.float().log_softmax(-1) for m in (model, other))
    return (wanted.exp() * (wanted - given)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_together_come_closer_to_the_original_predictions(family, text):
    done, plain = fitted(family, text, *MODEL), fitted(family, text, "refit.steps=0")
    (line,) = refit_lines(done)
    assert line["refit"]["after"] < 0.97 * line["refit"]["before"]
    ours, before = packed_modules(done.model), packed_modules(plain.model)
    assert all(
        torch.equal(module.compressed().codes, before[name].compressed().codes)
        for name, module in ours.items()
    )
    tokens = windows(family, text)[:8]
    with torch.no_grad():
        was, now = (divergence(m.model, tiny_model(family), tokens) for m in (plain, done))
    assert line["refit"]["before"] == pytest.approx(was, rel=1e-3)
    assert line["refit"]["after"] == pytest.approx(now, rel=1e-3)


@pytest.mark.parametrize("levels", ["fp16", "int8", "int8-row"])
def test_levels_that_move_together(levels, text):
    results = {}
    for form in ("free", "factor"):
        done = fitted("llama", text, *MODEL, f"refit.model_levels={form}", f"levels={levels}")
        (line,) = refit_lines(done)
        assert line["refit"]["after"] < 0.97 * line["refit"]["before"]
        results[form] = packed_modules(done.model)
    plain = packed_modules(fitted("llama", text, "refit.steps=0", f"levels={levels}").model)

    def unlike(form):
        """How far levels are from multiples of what they were, as a share of how far they moved."""
        apart = moved = 0.0
        for name, module in results[form].items():
            assert torch.equal(module.compressed().codes, plain[name].compressed().codes)
            x, y = (m.compressed().levels.values().double() for m in (plain[name], module))
            factor = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
            apart += float((y - factor * x).square().sum())
            moved += float((y - x).square().sum())
        return apart / moved

    assert unlike("factor") < 0.7 * unlike("free")


@pytest.mark.parametrize("recipe", ["pbs2p-4-8", "pbs2p-plus-ternary", "gptq-3"])
def test_a_factor_is_learnt_whatever_levels_there_are(recipe, text, tmp_path):
    model = ["refit.steps=0", "refit.model_steps=4", "refit.model_levels=factor"]
    done = fitted("llama", text, *model, recipe=recipe, out=tmp_path / "packed")
    (line,) = refit_lines(done)
    assert line["refit"]["after"] <= line["refit"]["before"]


def test_the_gradient_through_all_blocks_is_that_of_the_whole_model(text):
    model, original = fitted("llama", text, "refit.steps=0").model, tiny_model("llama")
    tokens = windows("llama", text)[:1]
    blocks = Blocks("model.layers", list(model.model.layers))
    linears = [list(packed_modules(block)) for block in blocks.modules]
    learners = [Learner(b, names) for b, names in zip(blocks.modules, linears)]
    calls = record_calls(model, blocks, tokens)
    hidden, cpu = first_inputs(model, blocks, tokens), torch.device("cpu")
    target = hidden.clone()
    for block, call in zip(find_blocks(original).modules, calls):
        target = run_block(block, target, call)
    job = _Job(learners, hidden, target, calls, ModelEnd(model, blocks), cpu, 0.0, [0])
    learning = [p for learner in learners for p in learner.begin()]
    job._differentiate(0)
    ours = [p.grad / job._scale for p in learning]
    with torch.enable_grad():
        x = hidden
        for learner, call in zip(learners, calls):
            x = call.run(learner, x)
        given = model.lm_head(model.model.norm(x)).log_softmax(-1)
        wanted = original(input_ids=tokens).logits.log_softmax(-1).detach()
        loss = (wanted.exp() * (wanted - given)).sum(-1).mean()
        theirs = torch.autograd.grad(loss, learning)
    for mine, whole in zip(ours, theirs):
        assert torch.allclose(mine, whole, rtol=1e-3, atol=1e-5 * whole.abs().max())


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_gradients_do_not_vanish_in_float16(text):
    """They are shares of the squares of large hidden states."""
    model = fitted("llama", text, "refit.steps=0").model.half()
    block = Blocks("model.layers", list(model.model.layers)).modules[0]
    tokens = windows("llama", text)[:1]
    call = record_calls(model, Blocks("model.layers", list(model.model.layers)), tokens)[0]
    shape, generator = (1, tokens.shape[1], model.config.hidden_size), torch.Generator()
    hidden = 1000 * torch.randn(shape, generator=generator.manual_seed(0)).half()
    target = run_block(block, hidden, call) * 1.05
    zeros = []

    def look(module, given):
        zeros.append(float((given[0] == 0).float().mean()))

    block.register_full_backward_pre_hook(look)
    spec = RefitSpec(steps=2)
    names = list(packed_modules(block))
    refit_block(block, names, hidden, target, call, spec, device=torch.device("cpu"))
    assert len(zeros) == 2 and max(zeros) < 0.01  # some outputs may be right


@pytest.mark.parametrize("pieces", ["null", "10"])
@pytest.mark.parametrize("learns_from", ["calibration", "sampled"])
@pytest.mark.parametrize("fails", ["refit_model", "commit_of"])
def test_an_interrupted_refit_of_the_model_resumes_to_the_same_bytes(
    fails, learns_from, pieces, text, tmp_path, monkeypatch
):
    from subbit import committed, job
    from subbit.text import sample

    model = tiny_model("gpt2")
    changes = [*REFIT, *MODEL[1:], f"refit.model_text={learns_from}"]
    changes.append(f"refit.model_seqlen={pieces}")
    kwargs = {"tokenizer": tiny_tokenizer(), "overrides": changes}
    whole = compress(copy.deepcopy(model), text, **kwargs)
    place = {"refit_model": job, "commit_of": committed}[fails]
    real, calls = getattr(place, fails), []
    last = 1 if fails == "refit_model" else len(model.transformer.h) + 2

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == last:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(place, fails, fail)
    kwargs["out"] = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(copy.deepcopy(model), text, **kwargs)
    monkeypatch.setattr(place, fails, real)
    monkeypatch.setattr(sample, "_continue", None)  # what was written is kept
    resumed = compress(copy.deepcopy(model), text, resume="required", **kwargs)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(refit_lines(resumed)) == len(refit_lines(whole))


class Interrupted(Exception):
    pass


def test_steps_of_an_interrupted_refit_of_the_model_are_kept(text, tmp_path, monkeypatch):
    from subbit.refit import model as refit

    kwargs = {"tokenizer": tiny_tokenizer(), "overrides": MODEL}
    whole = compress(tiny_model("llama"), text, **kwargs)
    real, windows = refit._Job._differentiate, []

    def differentiate(job, n):
        windows.append(n)
        if len(windows) == 4:
            raise Interrupted
        real(job, n)

    monkeypatch.setattr(refit, "_KEPT_EVERY", 0.0)
    monkeypatch.setattr(refit._Job, "_differentiate", differentiate)
    kwargs["out"] = tmp_path / "out"
    with pytest.raises(Interrupted):
        compress(tiny_model("llama"), text, **kwargs)
    resumed = compress(tiny_model("llama"), text, resume="required", **kwargs)
    (steps,) = (line["refit"]["steps"] for line in refit_lines(whole))
    assert len(windows) == steps + 1  # none but the one that failed twice
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("refit", [REFIT, MODEL])
def test_nothing_to_learn_is_no_error(refit, text):
    model = tiny_model("llama")
    blocks = find_blocks(model)
    for block in blocks.modules:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
    done = compress(model, text, "wanda-4-8", tokenizer=tiny_tokenizer(), overrides=refit)
    assert all(line["refit"]["after"] == line["refit"]["before"] for line in refit_lines(done))


def lessons_seen(monkeypatch):
    """A list that takes what every refit of a model is given: hidden states, target, order."""
    from subbit import job

    seen, real = [], job.refit_model

    def watched(model, blocks, linears, hidden, target, calls, spec, order, **kwargs):
        seen.append((hidden, target, order))
        return real(model, blocks, linears, hidden, target, calls, spec, order, **kwargs)

    monkeypatch.setattr(job, "refit_model", watched)
    return seen


def test_the_model_learns_from_what_it_writes(text, monkeypatch):
    seen = lessons_seen(monkeypatch)
    for learns_from in ("calibration", "sampled"):
        done = fitted("llama", text, *MODEL, f"refit.model_text={learns_from}")
        (line,) = refit_lines(done)
        assert line["refit"]["after"] < 0.95 * line["refit"]["before"]
    (hidden, target, order), (more, wanted, mixed) = seen
    given, steps = len(hidden), len(order)
    assert order == [step % given for step in range(steps)]
    assert mixed[::2] == [step % given for step in range(steps // 2)]
    assert mixed[1::2] == list(range(given, given + steps // 2))
    assert len(more) == len(wanted) == given + steps // 2
    assert torch.equal(more[:given], hidden) and torch.equal(wanted[:given], target)
    original = tiny_model("llama")  # the rest is what the original model makes of it
    blocks = find_blocks(original)
    calls = record_calls(original, blocks, windows("llama", text)[:1])
    for block, call in zip(blocks.modules, calls):
        more = run_block(block, more, call)
    assert torch.allclose(more, wanted, atol=1e-5)


@pytest.mark.parametrize("learns_from", ["calibration", "sampled"])
@pytest.mark.parametrize("bos", ["none", "window"])
def test_the_model_learns_from_pieces_of_windows(bos, learns_from, text, monkeypatch):
    seen = lessons_seen(monkeypatch)
    changes = [f"refit.model_text={learns_from}", "refit.model_seqlen=10", f"bos={bos}"]
    done = fitted("llama", text, *MODEL, *changes)
    (line,) = refit_lines(done)
    assert line["refit"]["after"] < 0.95 * line["refit"]["before"]
    ((hidden, target, order),) = seen
    original, tokens = tiny_model("llama"), windows("llama", text, bos=bos)
    each = tokens.shape[1] // 10
    assert each > 1 and tokens.shape[1] % 10
    pieces = torch.stack([window[i * 10 : i * 10 + 10] for window in tokens for i in range(each)])
    if bos == "window":
        pieces[:, 0] = tiny_tokenizer().bos_token_id
    with torch.no_grad():
        embedded = original.get_input_embeddings()(pieces)
    given = len(pieces)
    assert torch.equal(hidden[:given], embedded)
    steps = len(order)
    written = steps // 2 if learns_from == "sampled" else 0
    assert given + written <= len(hidden) == len(target) < given + written + each
    expected = [step % given for step in range(steps - written)]
    assert [window for window in order if window < given] == expected
    assert [window for window in order if window >= given] == list(range(given, given + written))
    blocks = find_blocks(original)
    for block, call in zip(blocks.modules, record_calls(original, blocks, pieces)):
        hidden = run_block(block, hidden, call)
    assert torch.allclose(hidden, target, atol=1e-5)


def test_windows_too_short_to_be_cut_are_taken_whole():
    assert RefitSpec().pieces(2048) == 1
    assert [RefitSpec(model_seqlen=512).pieces(n) for n in (64, 512, 1023, 1024, 2047)] == [
        1, 1, 1, 2, 3,
    ]  # fmt: skip


def test_a_finished_refit_of_the_model_is_not_done_again(text, tmp_path, monkeypatch):
    from subbit import job

    kwargs = {"tokenizer": tiny_tokenizer(), "overrides": MODEL, "out": tmp_path / "out"}
    whole = compress(tiny_model("llama"), text, **kwargs | {"out": None})
    monkeypatch.setattr(job.Workdir, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(tiny_model("llama"), text, **kwargs)
    monkeypatch.undo()
    monkeypatch.setattr(job, "refit_model", None)
    for step in ("propagate", "propagate_original"):  # nor is any block run
        monkeypatch.setattr(job.Calibrator, step, None)
    resumed = compress(tiny_model("llama"), text, resume="required", **kwargs)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["name"] for line in refit_lines(resumed)] == ["all blocks"]


def test_a_refit_of_the_model_that_makes_it_worse_is_taken_back(text):
    done = fitted("llama", text, *MODEL, "refit.model_rate=1000")
    plain = fitted("llama", text, "refit.steps=0")
    (line,) = refit_lines(done)
    assert line["refit"]["after"] == line["refit"]["before"]
    assert torch.equal(logits(done.model), logits(plain.model))


@pytest.mark.parametrize("refit", [REFIT, MODEL])
def test_what_is_skipped_stays_as_it_is(refit, text):
    skip = 'skip=["model.layers.1", "*.input_layernorm", "*.q_proj"]'
    done = fitted("qwen2", text, *refit, skip)
    before, after = dict(tiny_model("qwen2").named_parameters()), done.model.state_dict()
    left = [
        name
        for name in before
        if "layers.1." in name or "input_layernorm" in name or "q_proj" in name
    ]
    assert len(left) > 12 and all(torch.equal(after[name], before[name]) for name in left)
    name = "model.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(after[name], before[name])


def test_dense_weights_are_gone_when_all_blocks_are_refitted(text, monkeypatch):
    from subbit import job

    model = tiny_model("llama")
    linears = [m for block in find_blocks(model).modules for m in find_linears(block).values()]
    dense = [weakref.ref(linear) for linear in linears]
    del linears
    alive, real = [], job.refit_model

    def watched(*args, **kwargs):
        gc.collect()
        alive.append(sum(linear() is not None for linear in dense))
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "refit_model", watched)
    compress(model, text, tokenizer=tiny_tokenizer(), overrides=MODEL)
    assert alive == [0]


def test_hidden_states_of_calibration_are_gone_when_all_blocks_are_refitted(text, monkeypatch):
    from subbit import job

    alive, real = [], job.refit_model
    before = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}

    def watched(model, blocks, linears, hidden, target, *args, **kwargs):
        gc.collect()
        found = (x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in before)
        alive.append(sum(len(x) for x in found if x.shape[1:] == hidden.shape[1:]) / len(hidden))
        return real(model, blocks, linears, hidden, target, *args, **kwargs)

    monkeypatch.setattr(job, "refit_model", watched)
    for learns_from in ("calibration", "sampled"):
        fitted("llama", text, *MODEL, f"refit.model_text={learns_from}")
    assert alive == [2, 2]


def test_the_rate_warms_up_and_falls_to_nothing():
    parameter = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer, rates = Adam([parameter], 0.1, 20), []
    for _ in range(20):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(
            2
        )  # with the same gradient always, a step is as long as its rate
        optimizer.step()
        rates.append((before - parameter.detach()).max().item())
    assert parameter.grad is None
    assert rates[0] == pytest.approx(0.1 * 2 / 2)  # the first of two steps of warm-up
    assert max(rates) == rates[1] == pytest.approx(0.2, rel=0.01)
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.01


def test_loose_tensors_are_norms_and_biases():
    block = tiny_model("gpt2").transformer.h[0]
    names = set(loose_tensors(block, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]))
    assert {"ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "mlp.c_proj.bias"} <= names
    assert not any(name.endswith("c_attn.weight") for name in names)
