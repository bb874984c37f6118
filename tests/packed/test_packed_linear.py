import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_examples import linears, make_linear
from torch import nn

from subbit.errors import FormatError
from subbit.packed import PackedLinear, pack


def _module(bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    b = torch.linspace(-1, 1, 24) if bias else None
    return PackedLinear.from_compressed(make_linear(24, 100, group_size=32), b, dtype)


def _x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(5)).to(dtype)


@given(linears())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_dequantize_is_that_of_the_compressed_linear(linear):
    module = PackedLinear.from_compressed(linear, None, torch.float32)
    assert torch.equal(module.dequantize(), linear.dequantize())
    assert torch.equal(module.compressed().kept, linear.kept)


@given(linears(), st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_autocast_changes_no_stored_number(linear, low):
    """Where a grid has whole numbers beside its scale, among others."""
    with torch.autocast("cpu", low):
        module = PackedLinear.from_compressed(linear, None, torch.float32)
        dense = module.dequantize()
        again = module.compressed()
    assert torch.equal(dense, linear.dequantize())
    assert torch.equal(again.dequantize(), linear.dequantize())


def test_dequantize_over_several_row_chunks():
    linear = make_linear(1030, 1100)
    module = PackedLinear.from_compressed(linear, None, torch.float32)
    assert torch.equal(module.dequantize(), linear.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_linear_with_the_dense_weight(dtype, bias):
    module, x = _module(bias, dtype), _x(dtype)
    weight = make_linear(24, 100, group_size=32).dequantize().to(dtype)
    expected = nn.functional.linear(x, weight, module.bias)
    assert torch.equal(module(x), expected)
    module.keep_dense = True
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)


def test_bias_is_cast_to_the_inputs_dtype():
    module = _module(True, torch.float32)
    assert module(_x(torch.bfloat16)).dtype == torch.bfloat16


def test_parameters_are_the_fields_and_the_bias():
    module = _module()
    layout, tensors = pack(make_linear(24, 100, group_size=32))
    assert module.layout == layout
    assert list(module.state_dict()) == [*layout.fields(), "bias"]
    assert next(iter(nn.ModuleDict({"proj": module}).state_dict())) == "proj.mask"
    assert not any(parameter.requires_grad for parameter in module.parameters())
    for name, tensor in tensors.items():
        assert torch.equal(getattr(module, name), tensor)
    assert "bias" not in _module(bias=False).state_dict()
    assert (module.in_features, module.out_features) == (100, 24)


@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(assign):
    module = _module()
    with torch.device("meta" if assign else "cpu"):
        other = PackedLinear(module.layout, True, torch.float32)
    assert all(p.is_meta == assign for p in other.parameters())
    other.keep_dense = True
    if not assign:
        other(_x())  # a cache of the weight before loading must not survive
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other(_x()), module(_x()))


def test_a_state_dict_of_another_layout_is_refused():
    module = _module()
    with pytest.raises(RuntimeError, match="size mismatch"):
        PackedLinear(module.layout, True, torch.float32).load_state_dict(
            {**module.state_dict(), "mask": torch.zeros(24, 1, dtype=torch.uint8)}
        )


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float64),
    ],
)
def test_dtype_moves_change_the_bias_alone(move):
    before, expected = _module(), _module().dequantize()
    fields = {name: tensor.clone() for name, tensor in before.fields().items()}
    model = move(nn.Sequential(before, nn.Linear(24, 4)))
    for name, tensor in model[0].fields().items():
        assert tensor.dtype == fields[name].dtype
        assert torch.equal(tensor, fields[name])
    assert model[0].bias.dtype == model[1].weight.dtype != torch.float32
    assert torch.equal(model[0].dequantize(), expected)


def test_a_move_to_meta_moves_every_field():
    module = _module().to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.levels.dtype == torch.float16


def test_dense_weight_is_dropped_by_moves_and_follows_the_inputs_dtype():
    module = _module()
    module.keep_dense = True
    module(_x())
    module.to(torch.bfloat16)
    assert module._dense is None
    assert torch.equal(
        module(_x(torch.bfloat16)), _module(dtype=torch.bfloat16)(_x(torch.bfloat16))
    )
    assert module._dense.dtype == torch.bfloat16
    assert torch.equal(module(_x()), _module(dtype=torch.bfloat16)(_x()))


def test_dense_weight_is_kept_once_and_let_go():
    module = _module()
    module(_x())
    assert module._dense is None
    module.keep_dense = True
    module(_x())
    kept = module._dense
    module(_x())
    assert module._dense is kept
    assert "_dense" not in module.state_dict()
    module.keep_dense = False
    module(_x())
    assert module._dense is None


def test_copies_and_pickles_carry_no_dense_weight():
    module = _module()
    module.keep_dense = True
    module(_x())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert other._dense is None
        assert other.keep_dense
        assert torch.equal(other(_x()), module(_x()))
    assert module._dense is not None
    assert torch.equal(copy.copy(module)(_x()), module(_x()))


def test_a_weight_kept_under_inference_mode_serves_autograd_later():
    module = _module()
    module.keep_dense = True
    with torch.inference_mode():
        module(_x())
    x = _x().requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad[0, 0], module.dequantize().sum(0), atol=1e-5)


def test_from_compressed_shares_no_memory_and_checks_the_bias():
    linear, bias = make_linear(24, 100), torch.ones(24)
    module = PackedLinear.from_compressed(linear, bias, torch.float32)
    linear.levels.params.zero_()
    bias.zero_()
    assert module.levels.abs().sum() > 0
    assert module.bias.sum() == 24
    with pytest.raises(ValueError, match=r"bias must be \(24,\)"):
        PackedLinear.from_compressed(linear, torch.ones(23), torch.float32)


def test_damaged_bytes_are_refused_at_forward():
    module = _module()
    module.mask.data.fill_(255)
    with pytest.raises(FormatError, match="'mask'"):
        module(_x())


def test_repr_tells_shape_structure_and_bits():
    text = repr(_module())
    assert "in_features=100, out_features=24, nm=4:8" in text
    assert "bias=True" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(linears())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bytes_and_weights_on_a_gpu_equal_those_on_the_cpu(linear):
    module = PackedLinear.from_compressed(linear, None, torch.float32)
    moved = copy.deepcopy(module).to("cuda")
    assert torch.equal(moved.dequantize().cpu(), linear.dequantize())
    _, tensors = pack(moved.compressed())
    assert all(torch.equal(tensors[name].cpu(), t) for name, t in module.fields().items())
