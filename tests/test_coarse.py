"""The coarse stage by linear: damage is measured, the budget holds, the model is left alone."""

import copy

import pytest
import torch

from subbit.coarse import CoarseStage
from subbit.job import Job
from subbit.methods import make_method
from subbit.model import find_blocks, find_linears, first_inputs, record_calls
from subbit.prune.allocate import allocate_measured, mean_kept
from subbit.recipe import load_recipe
from test_compression import compress
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer

MEASURED = ["coarse.allocation=measured", "n_high=4", "n_low=2"]


def stage(model, *overrides):
    windows = torch.randint(0, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)
    calls, hidden = record_calls(model, blocks, windows), first_inputs(model, blocks, windows)
    recipe = load_recipe("wanda-4-8").override([*MEASURED, *overrides])
    linears = [find_linears(block) for block in blocks.modules]
    method = make_method(recipe.method, recipe.options)
    return CoarseStage(recipe, blocks, calls, hidden, linears, method, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_nothing_and_takes_the_steps_it_said(family):
    model = tiny_model(family)
    before, seen = copy.deepcopy(model.state_dict()), []
    found = stage(model)
    hidden = found.hidden.clone()
    facts = found.look(seen.append)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(hidden, found.hidden)
    assert sum(seen) == found.steps
    assert len(facts["damages"]) == sum(map(len, found.linears))
    assert all(damage > 0 for damage in facts["damages"])
    assert facts["losses"] == sorted(facts["losses"], reverse=True) and facts["losses"][-1] < 1e-5
    assert facts == stage(tiny_model(family)).look()
    kept, mean = found.kept(facts)
    numbers = [n for block in kept for n in block.values()]
    assert len(set(numbers)) > 1 and min(numbers) >= 2 and max(numbers) <= 8 and mean <= 4


def test_what_a_small_change_does_is_not_lost_in_bfloat16():
    found = stage(tiny_model("llama").bfloat16())
    entering = [found.hidden[:1].float()]
    for i in range(len(found.linears)):
        entering.append(found._run_exactly(i, entering[-1]))
    linear = found.linears[0]["self_attn.k_proj"]
    weight = linear.weight.detach().float()
    assert found._damage(0, linear, weight, entering) == 0
    weight[0, 0] *= 1.02  # some steps of bfloat16
    assert 0 < found._damage(0, linear, weight, entering) < 1e-7


def test_a_linear_that_matters_more_keeps_more():
    def down_projection(scale):
        model = tiny_model("llama")
        model.model.layers[1].mlp.down_proj.weight.data.mul_(scale)
        found = stage(model)
        return found.kept(found.look())[0][1]["mlp.down_proj"]

    assert down_projection(20) > down_projection(0.2)


def test_the_knapsack():
    losses = [0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.01, 0.0]
    sizes = [10, 10, 10, 1]

    def kept(damages, high=4, low=2):
        return allocate_measured(damages, losses, sizes, (4, 8), n_high=high, n_low=low)

    assert kept([1, 1, 1, 0.1]) == [4, 4, 4, 4]
    assert kept([100, 1, 1, 1])[0] > 4
    assert kept([1, 1, 1, 50])[3] == 8  # it is small
    assert kept([1, 1, 1, 50], high=1)[3] == 5
    for damages in ([1, 2, 3, 4], [9, 1, 0, 0], [0, 0, 0, 0], [5, 5, 0.1, 7]):
        found = kept(damages)
        assert mean_kept(found, sizes) <= 4 and min(found) >= 2
        assert mean_kept(found, sizes) > 4 - 10 / 31  # no step that fits is left out


def test_end_to_end_the_allocation_is_followed(text):
    def run(**kwargs):
        model, tokenizer = tiny_model("llama"), tiny_tokenizer()
        return compress(
            model, text, "pbs2p-plus-4-8", tokenizer=tokenizer, overrides=MEASURED, **kwargs
        )

    done = run()
    kept = done.report["kept"]
    for i, block in enumerate(kept):
        for name, n in block.items():
            assert done.records[f"model.layers.{i}.{name}"]["nm"] == [n, 8]
    assert done.report["mean_kept"] <= 4
    uniform = compress(
        tiny_model("llama"), text, "pbs2p-plus-4-8", tokenizer=tiny_tokenizer()
    ).report["kept"]
    assert kept != uniform and all(n == 4 for block in uniform for n in block.values())


def test_what_was_measured_is_kept_for_a_restart(text, tmp_path, monkeypatch):
    def run(**kwargs):
        model, tokenizer = tiny_model("llama"), tiny_tokenizer()
        out = tmp_path / "out"
        return compress(
            model,
            text,
            "pbs2p-plus-4-8",
            tokenizer=tokenizer,
            overrides=MEASURED,
            out=out,
            **kwargs,
        )

    def interrupt(*args):
        raise KeyboardInterrupt

    looks, look = [], CoarseStage.look
    monkeypatch.setattr(CoarseStage, "look", lambda *args: (looks.append(1), look(*args))[1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "_compress_block", interrupt)
        run()
    done = run(resume="required")
    assert len(looks) == 1 and done.report["mean_kept"] <= 4
