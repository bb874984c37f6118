"""Fingerprints tell models apart, and NaN in weights is named."""

import pytest
import torch

from subbit.errors import NonFiniteError
from subbit.model import check_finite, fingerprint
from tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_stable_and_survives_saving(family, tmp_path):
    model = tiny_model(family)
    mark = fingerprint(model)
    assert len(mark) == 64 and mark == fingerprint(tiny_model(family))
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == mark


def test_fingerprint_sees_a_value_a_name_a_dtype_and_a_buffer():
    marks = {fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", seed=1))}
    model = tiny_model("llama")
    weight = model.model.layers[2].mlp.down_proj.weight
    weight.view(torch.int32)[-1, -1] ^= 1  # the least bit of the last value
    marks.add(fingerprint(model))
    marks.add(fingerprint(model.to(torch.bfloat16)))
    mlp = model.model.layers[2].mlp
    mlp.dawn_proj = mlp.down_proj
    del mlp.down_proj
    marks.add(fingerprint(model))
    assert len(marks) == 5
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    marks.add(fingerprint(model))
    assert len(marks) == 5
    model.register_buffer("kept", torch.zeros(2))
    marks.add(fingerprint(model))
    assert len(marks) == 6


def test_check_finite_names_the_parameter_and_counts():
    model = tiny_model("gpt2").to(torch.bfloat16)
    check_finite(model)
    model.transformer.h[1].mlp.c_fc.weight[0, :5] = float("nan")
    model.transformer.h[1].mlp.c_fc.weight[1, 0] = float("-inf")
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight has 6 NaN"):
        check_finite(model)
