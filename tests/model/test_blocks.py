"""Blocks and linears are found in every family, and nothing is skipped in silence."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from subbit.errors import ModelError
from subbit.model import (
    check_coverage,
    find_blocks,
    find_linears,
    is_skipped,
    replace_module,
    weight_of,
)
from tiny_models import FAMILIES, tiny_model

SPLIT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPECTED = {
    "phi3": (
        "model.layers",
        ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "opt": (
        "model.decoder.layers",
        [f"self_attn.{p}_proj" for p in ("k", "v", "q", "out")] + ["fc1", "fc2"],
    ),
    "gpt-neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_are_found(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    path, names = EXPECTED.get(family, ("model.layers", SPLIT + GATED))
    assert blocks.path == path
    assert len(blocks.modules) == 3
    for i, block in enumerate(blocks.modules):
        assert model.get_submodule(blocks.name(i)) is block
        linears = find_linears(block)
        assert sorted(linears) == sorted(names)
        in_order = [name for name, _ in block.named_modules() if name in linears]
        assert list(linears) == in_order


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_accounts_for_every_matrix(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    kept = dict(check_coverage(model, blocks, []))
    linear = sum(weight_of(m).numel() for b in blocks.modules for m in find_linears(b).values())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert sum(kept.values()) + linear == matrices
    assert all(any(w in name for w in ("embed", "wte", "wpe", "lm_head")) for name in kept), kept


@pytest.mark.parametrize(
    ("family", "culprit", "share"),
    [
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj (4×192×64)", 0.5),
        ("qwen3-moe", "model.layers.0.mlp.experts.gate_up_proj (4×64×64)", 0.3),
        ("opt-projected", "model.decoder.project_out.weight (32×64)", 0.01),
    ],
)
def test_weights_outside_the_linears_are_refused(family, culprit, share):
    model = tiny_model(family)
    blocks = find_blocks(model)
    with pytest.raises(ModelError) as error:
        check_coverage(model, blocks, [])
    message = str(error.value)
    assert culprit in message
    assert "--set skip=" in message
    told = float(message.partition("%")[0].rpartition(" ")[2]) / 100
    assert told > share
    # the advice in the message works
    advice = json.loads(message.partition("skip='")[2].rpartition("'")[0])
    kept = dict(check_coverage(model, blocks, advice))
    assert culprit.partition(" ")[0] in kept


def test_skip_patterns_match_whole_names_of_modules_and_parameters():
    assert is_skipped("model.layers.0.mlp.gate.weight", ["*.mlp.gate"])
    assert is_skipped("model.layers.0.mlp.gate", [r"model\.layers\.\d+\.mlp\.gate"])
    assert is_skipped("visual.blocks.0.fc.weight", ["visual"])
    assert not is_skipped("model.layers.0.mlp.gate_proj.weight", ["*.mlp.gate"])
    assert not is_skipped("model.layers.0.mlp.gate.weight", ["gate", "mlp"])
    assert not is_skipped("model.layers.0", [])


def test_skipped_linears_are_kept_and_listed():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    kept = dict(check_coverage(model, blocks, ["*.down_proj"]))
    assert kept["model.layers.2.mlp.down_proj.weight"] == 64 * 96
    with pytest.raises(ModelError, match=r"'\*\.down_prj' matches no parameter.*down_proj"):
        check_coverage(model, blocks, ["*.down_prj"])
    with pytest.raises(ModelError, match=r"nothing .* is left to compress"):
        check_coverage(model, blocks, ["model.layers"])


def test_a_model_without_blocks_is_refused_by_class():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    with pytest.raises(ModelError, match="Flat has no decoder blocks"):
        find_blocks(Flat())


def test_subclasses_count_only_if_they_act_as_linears():
    class Spelled(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    block = nn.ModuleDict({"a": Spelled(8, 6), "b": Router(8, 6), "c": Pair(8, 6)})
    block["d"] = Conv1D(5, 8)
    assert list(find_linears(block)) == ["a", "d"]


def test_weight_of_has_outputs_in_rows():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for linear in (nn.Linear(8, 5), Conv1D(5, 8)):
        weight = weight_of(linear)
        assert weight.shape == (5, 8)
        assert not weight.requires_grad
        assert torch.allclose(linear(x), F.linear(x, weight, linear.bias), atol=1e-6)


def test_replace_module():
    model = tiny_model("llama")
    new = nn.Identity()
    replace_module(model, "model.layers.1.mlp.up_proj", new)
    assert model.model.layers[1].mlp.up_proj is new
    with pytest.raises(ModelError, match=r"no module 'model\.layers\.9"):
        replace_module(model, "model.layers.9.mlp", new)
