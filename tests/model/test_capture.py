"""Running blocks one by one is running the model, and accumulators get what linears get."""

import pytest
import torch
from torch.nn import functional as F

from subbit.errors import ModelError, NonFiniteError
from subbit.model import (
    block_similarities,
    capture_inputs,
    find_blocks,
    find_linears,
    first_inputs,
    in_float32,
    record_calls,
    run_block,
)
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

NSAMPLES, SEQLEN = 3, 16


class Rows:
    """Keeps everything it is given."""

    def __init__(self, features):
        self.features = features
        self.seen = []
        self.tokens = 0

    def add(self, x):
        assert x.ndim == 2 and x.shape[1] == self.features
        self.seen.append(x.clone())
        self.tokens += len(x)


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB_SIZE, (NSAMPLES, SEQLEN), generator=generator)


def prepare(model, windows):
    blocks = find_blocks(model)
    return blocks, record_calls(model, blocks, windows), first_inputs(model, blocks, windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_chained_blocks_are_the_model(family, windows):
    model = tiny_model(family)
    blocks, calls, hidden = prepare(model, windows)
    reference = model.base_model(windows, output_hidden_states=True)
    for i, (block, call) in enumerate(zip(blocks.modules, calls)):
        out = run_block(block, hidden, call)
        assert out.data_ptr() != hidden.data_ptr()
        if i + 1 < len(calls):
            assert torch.allclose(out, reference.hidden_states[i + 1], atol=1e-5)
        hidden = out
    body = model.base_model.decoder if family == "opt" else model.base_model
    names = ("norm", "final_layer_norm", "ln_f")
    final = next(m for n, m in body.named_children() if n in names)
    assert torch.allclose(final(hidden), reference.last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulators_get_what_the_linears_get(family, windows):
    model = tiny_model(family)
    blocks, calls, hidden = prepare(model, windows)
    hidden = run_block(blocks.modules[0], hidden, calls[0])
    untouched = hidden.clone()
    linears = find_linears(blocks.modules[1])
    ticks = []
    captured = capture_inputs(
        blocks.modules[1], hidden, calls[1], linears, Rows, advance=ticks.append
    )
    assert torch.equal(hidden, untouched)
    assert ticks == [1] * NSAMPLES
    assert list(captured) == list(linears)

    expected = {name: [] for name in linears}
    hooks = [
        linear.register_forward_pre_hook(lambda m, args, n=name: expected[n].append(args[0]))
        for name, linear in linears.items()
    ]
    model.base_model(windows)
    for hook in hooks:
        hook.remove()
    for name, rows in captured.items():
        seen = torch.cat(rows.seen)
        assert rows.tokens == NSAMPLES * SEQLEN == len(seen)
        assert torch.allclose(seen, expected[name][0].flatten(0, -2), atol=1e-4), name


def test_linears_with_one_input_share_one_accumulator(windows):
    def groups(family):
        model = tiny_model(family)
        blocks, calls, hidden = prepare(model, windows)
        linears = find_linears(blocks.modules[0])
        captured = capture_inputs(blocks.modules[0], hidden, calls[0], linears, Rows)
        shared = {}
        for name, rows in captured.items():
            shared.setdefault(id(rows), []).append(name.rpartition(".")[2])
        return list(shared.values())

    assert groups("llama-gqa") == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert groups("opt") == [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]]
    assert len(groups("gpt2")) == 4
    assert len(groups("gpt-neox")) == 4


def test_running_in_place_gives_the_same(windows):
    model = tiny_model("qwen3")
    blocks, calls, hidden = prepare(model, windows)
    expected = run_block(blocks.modules[0], hidden, calls[0])
    result = run_block(blocks.modules[0], hidden, calls[0], out=hidden)
    assert result is hidden
    assert torch.equal(hidden, expected)


def test_similarities_are_those_of_the_models_own_hidden_states(windows):
    model = tiny_model("llama")
    blocks, calls, hidden = prepare(model, windows)
    untouched = hidden.clone()
    similarities = block_similarities(blocks, calls, hidden)
    assert torch.equal(hidden, untouched)
    states = model.base_model(windows, output_hidden_states=True).hidden_states
    expected = [F.cosine_similarity(states[i], states[i + 1], dim=-1).mean() for i in range(2)]
    assert similarities[:2] == pytest.approx([float(e) for e in expected], abs=1e-6)
    assert len(similarities) == 3
    assert -1 <= similarities[2] < 1


def test_a_linear_that_never_runs_is_named(windows):
    model = tiny_model("llama")
    blocks, calls, hidden = prepare(model, windows)
    linears = find_linears(blocks.modules[0]) | {"ghost": torch.nn.Linear(64, 64)}
    with pytest.raises(ModelError, match=r"^ghost of model\.layers\.0 never ran"):
        capture_inputs(blocks.modules[0], hidden, calls[0], linears, Rows)
    assert not blocks.modules[0].mlp.up_proj._forward_pre_hooks


def test_nan_is_named_where_it_appears(windows):
    model = tiny_model("llama")
    blocks, calls, hidden = prepare(model, windows)
    block = blocks.modules[1]
    block.mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^model\.layers\.1\.mlp\.up_proj puts out NaN"):
        run_block(block, hidden, calls[1])
    with pytest.raises(NonFiniteError, match=r"^model\.layers\.1\.mlp\.up_proj puts out NaN"):
        block_similarities(blocks, calls, hidden)
    with pytest.raises(NonFiniteError, match=r"^mlp\.down_proj of model\.layers\.1 is given NaN"):
        capture_inputs(block, hidden, calls[1], find_linears(block), Rows)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.modules())
    hidden[2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^self_attn\.q_proj of model\.layers\.0 is given"):
        capture_inputs(blocks.modules[0], hidden, calls[0], find_linears(blocks.modules[0]), Rows)


def test_blocks_that_change_the_dtype_are_refused(windows):
    model = tiny_model("llama")
    _, calls, hidden = prepare(model, windows)

    class Wider(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 64)

        def forward(self, x, **kwargs):
            return self.fc(x).double(), None

    with pytest.raises(ModelError, match=r"model\.layers\.0 turns .* into .*float64"):
        run_block(Wider(), hidden, calls[0])


def test_gradients_and_hooks_are_left_as_they_were(windows):
    model = tiny_model("gpt2")
    blocks, calls, hidden = prepare(model, windows)
    out = run_block(blocks.modules[0], hidden, calls[0])
    assert torch.is_grad_enabled()
    assert not out.requires_grad
    with pytest.raises(ZeroDivisionError):
        run_block(blocks.modules[0], hidden, calls[0], advance=lambda n: n // 0)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_block_in_float32_is_what_it_was_afterwards(family, windows):
    model = tiny_model(family).bfloat16()
    block = find_blocks(model).modules[0]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    buffers = dict(block.named_buffers())
    with in_float32(block):
        assert all(p.dtype == torch.float32 for p in block.parameters())
        with pytest.raises(KeyError), in_float32(block):
            raise KeyError
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert all(buffers[name] is buffer for name, buffer in block.named_buffers())
