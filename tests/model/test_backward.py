"""Gradients block by block are those of the whole model."""

import pytest
import torch

from subbit.model import (
    OutputGrams,
    TokenGradients,
    find_blocks,
    find_linears,
    first_inputs,
    look_at_gradients,
    record_calls,
)
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")


def looked_at(family):
    """The model, its linears by block, token ids, and what was found of tokens and of outputs."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 16), generator=generator)
    blocks = find_blocks(model)
    linears = [find_linears(block) for block in blocks.modules]
    calls, hidden = record_calls(model, blocks, tokens), first_inputs(model, blocks, tokens)
    takers = TokenGradients(linears, tokens), OutputGrams(linears)
    look_at_gradients(model, blocks, linears, hidden, calls, tokens, takers, device=CPU)
    return model, linears, tokens, *(taker.found for taker in takers)


def whole_gradients(model, linears, tokens):
    """Window, block, linear and the gradient in its output `(tokens, outputs)`, by autograd."""
    outputs = {}

    def keep(key):
        return lambda module, args, output: outputs.__setitem__(key, output)

    handles = [
        linear.register_forward_hook(keep((i, name)))
        for i, own in enumerate(linears)
        for name, linear in own.items()
    ]
    for n, ids in enumerate(tokens):
        with torch.enable_grad():
            model.requires_grad_(True)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        for (i, name), gradient in zip(outputs, gradients, strict=True):
            yield n, i, name, gradient.flatten(0, -2)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_tokens_matter_is_what_the_whole_model_says(family):
    model, linears, tokens, found, _ = looked_at(family)
    for n, i, name, gradient in whole_gradients(model, linears, tokens):
        wanted = gradient.square().sum(-1)
        assert torch.allclose(found[i][name][n], wanted, rtol=1e-3, atol=1e-6 * wanted.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_outputs_matter_is_what_the_whole_model_says(family):
    model, linears, tokens, _, found = looked_at(family)
    wanted = {}
    for _, i, name, gradient in whole_gradients(model, linears, tokens):
        size = gradient.square().sum(-1, keepdim=True)
        cut = gradient * (4 * size[size > 0].median() / size.clamp_min(1e-30)).clamp_max(1).sqrt()
        wanted[i, name] = wanted.get((i, name), 0) + cut.T @ cut
    assert len(wanted) == sum(map(len, found)) > 0
    for (i, name), G in wanted.items():
        assert found[i][name].tokens == tokens.numel()
        assert torch.allclose(found[i][name].H, G, rtol=1e-3, atol=1e-5 * G.diagonal().max())


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    model, linears, *_ = looked_at("llama")
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == wants[name]
    assert not any(linear._forward_hooks for own in linears for linear in own.values())
