"""The end of a model alone gives the logits that the whole model gives."""

import pytest
import torch

from subbit.model import ModelEnd, find_blocks, first_inputs, record_calls, run_block
from tiny_models import FAMILIES, tiny_model

TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    hidden = first_inputs(model, blocks, TOKENS)
    for block, call in zip(blocks.modules, record_calls(model, blocks, TOKENS)):
        hidden = run_block(block, hidden, call)
    end = ModelEnd(model, blocks)
    with torch.no_grad():
        whole = model(input_ids=TOKENS).logits
        assert torch.allclose(end.logits(hidden[1]), whole[1], rtol=1e-5, atol=1e-6)
        assert torch.allclose(end.logits(hidden[1, 7:9]), whole[1, 7:9], rtol=1e-5, atol=1e-6)
        assert end.vocabulary == whole.shape[-1]
        assert torch.equal(model(input_ids=TOKENS).logits, whole)  # the blocks are back


def test_gradients_reach_the_hidden_states():
    model = tiny_model("llama")
    leaf = torch.randn(5, model.config.hidden_size, requires_grad=True)
    ModelEnd(model, find_blocks(model)).logits(leaf).square().sum().backward()
    assert leaf.grad.abs().sum(-1).gt(0).all()


def test_everything_outside_the_blocks_moves_and_comes_back():
    model = tiny_model("llama")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    end = ModelEnd(model, find_blocks(model))
    with end.on(torch.device("cpu")):
        assert end.logits(torch.zeros(2, model.config.hidden_size)).shape == (2, end.vocabulary)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
