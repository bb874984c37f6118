"""What the blocks are called with is recorded, and blocks that cannot stand alone are refused."""

import pytest
import torch
from torch import nn

from subbit.errors import CalibrationError, ModelError, NonFiniteError
from subbit.model import find_blocks, first_inputs, record_calls
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

SEQLEN = 16


def windows(nsamples: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (nsamples, SEQLEN), generator=generator)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_first_inputs_are_what_the_model_gives_block_0(family):
    model, tokens = tiny_model(family), windows()
    blocks = find_blocks(model)
    before = hook_count(model)
    seen = []
    ticks = []
    hidden = first_inputs(model, blocks, tokens, advance=ticks.append)
    assert hook_count(model) == before
    assert ticks == [1, 1, 1]
    outputs = model.base_model(tokens, output_hidden_states=True)
    seen = outputs.hidden_states[0]
    assert hidden.shape == (3, SEQLEN, 64)
    assert torch.equal(hidden, seen)
    # and the model is unharmed by having been stopped half-way
    again = model.base_model(tokens, output_hidden_states=True)
    assert torch.equal(again.last_hidden_state, outputs.last_hidden_state)


@pytest.mark.parametrize("nsamples", [1, 2])
def test_calls_keep_no_cache_and_no_hooks(nsamples):
    model = tiny_model("gemma3")
    blocks = find_blocks(model)
    before = hook_count(model)
    calls = record_calls(model, blocks, windows(nsamples))
    assert hook_count(model) == before
    assert [call.name for call in calls] == [f"model.layers.{i}" for i in range(3)]
    assert all(call.kwargs["past_key_values"] is None for call in calls)
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert masks[0] is masks[2]  # the masks of the sliding layers are shared, not copied
    assert masks[0] is not masks[1]


class Chain(nn.Module):
    """A causal LM in outline: embedding, blocks, what happens between them up to a subclass."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 8)
        self.layers = nn.ModuleList(Link() for _ in range(3))

    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, bias=None)
        return x


class Link(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, bias=None):
        y = self.fc(hidden_states)
        return y if bias is None else y + bias


class TextDependent(Chain):
    def forward(self, input_ids, use_cache=None):
        x = bias = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, bias=bias)
        return x


class Meddling(Chain):
    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) * 2
        return x


class Repeating(Chain):
    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for layer in [*self.layers, self.layers[0]]:
            x = layer(hidden_states=x)
        return x


class Lazy(Chain):
    def forward(self, input_ids, use_cache=None):
        return self.layers[1](self.layers[0](self.embed(input_ids)))


class Headless(Chain):
    def forward(self, input_ids, use_cache=None):
        return self.embed(input_ids)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TextDependent, r"layers\.0 takes an input that depends on the text, argument 'bias'"),
        (Meddling, r"layers\.1 does not get the hidden states that layers\.0 gave"),
        (Repeating, r"layers\.0 is called out of order or more than once"),
        (Lazy, r"layers\.2 is never called"),
        (Headless, r"layers\.0 is never called"),
    ],
)
def test_blocks_that_cannot_stand_alone_are_refused(kind, message):
    model = kind()
    before = hook_count(model)
    with pytest.raises(ModelError, match=message):
        record_calls(model, find_blocks(model), windows())
    assert hook_count(model) == before


def test_a_plain_chain_passes_and_hidden_states_may_come_by_keyword():
    class ByKeyword(Chain):
        def forward(self, input_ids, use_cache=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(hidden_states=x)
            return x

    for kind in (Chain, ByKeyword):
        model = kind()
        blocks = find_blocks(model)
        calls = record_calls(model, blocks, windows())
        hidden = first_inputs(model, blocks, windows())
        with torch.no_grad():
            for block, call in zip(blocks.modules, calls):
                hidden = call.run(block, hidden)
            assert torch.allclose(hidden, model(windows()))


def test_first_inputs_refuses_nan_and_bad_windows():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    with pytest.raises(CalibrationError, match=r"\(0, 16\)"):
        first_inputs(model, blocks, windows()[:0])
    tokens = windows()
    model.model.embed_tokens.weight[tokens[2, 5]] = float("nan")
    clean = tokens[:1].clone()
    clean[clean == tokens[2, 5]] = (tokens[2, 5] + 1) % VOCAB_SIZE
    first_inputs(model, blocks, clean)
    with pytest.raises(NonFiniteError, match=r"before model\.layers\.0"):
        first_inputs(model, blocks, tokens)
    with pytest.raises(ModelError, match="never calls its block"):
        headless = Headless()
        first_inputs(headless, find_blocks(headless), tokens)
