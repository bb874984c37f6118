"""A packed linear on the CPU backend: the same module to everyone who looks at it."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from int8_examples import make_int8
from packed_examples import make_linear
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from subbit.errors import FormatError, RecipeError
from subbit.packed import PackedLinear
from subbit.packed.kernels import op


def module(backend="cpu", dtype=torch.float32, **options) -> PackedLinear:
    linear = make_int8(40, 200, seed=2, **options)
    made = PackedLinear.from_compressed(linear, torch.linspace(-1, 1, 40), dtype)
    made.set_backend(backend)
    return made


def x(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, 200, generator=torch.Generator().manual_seed(5)).to(dtype)


def close(y: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-4) -> bool:
    return bool((y - wanted).norm() <= bound * wanted.norm())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (30,)])
def test_forward_is_that_of_the_reference(shape):
    assert close(module()(x(*shape)), module("reference")(x(*shape)))
    one = module()
    one.planes = 1
    assert close(one(x(*shape)), module("reference")(x(*shape)), 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_in_the_dtype_of_x(dtype):
    y = module(dtype=dtype)(x(3, dtype=dtype))
    assert y.dtype == dtype
    assert close(y.float(), module("reference")(x(3, dtype=dtype).float()), 2e-2)


def test_the_state_dict_is_that_of_the_reference():
    state, wanted = module().state_dict(), module("reference").state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_there_and_back_changes_nothing():
    made = module()
    assert made.backend == "cpu"
    assert torch.equal(made.dequantize(), make_int8(40, 200, seed=2).dequantize())
    assert torch.equal(made.compressed().codes, make_int8(40, 200, seed=2).codes)
    held = [*made.parameters(), *made.buffers()]
    assert sum(t.numel() for t in held if t.dtype == torch.uint8) < 3 * 16 * (960 + 960) + 256
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    assert made.bits() == module("reference").bits()
    made.set_backend("cpu")
    made.set_backend("reference")
    assert torch.equal(made(x(2)), module("reference")(x(2)))
    assert not list(made.buffers())


def test_loading_a_state_dict():
    other = PackedLinear.from_compressed(make_int8(40, 200, seed=9), torch.zeros(40), torch.float32)
    made = module()
    made.load_state_dict(other.state_dict())
    assert made.backend == "cpu"
    assert torch.equal(made.dequantize(), other.dequantize())


def test_copies_and_pickles():
    made = module()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.backend == "cpu"
        assert torch.equal(other(x(2)), made(x(2)))


def test_dtype_and_device_changes():
    made = module().bfloat16()
    assert made.backend == "cpu" and made.bias.dtype == torch.bfloat16
    assert torch.equal(made.float().dequantize(), module().dequantize())
    gone = made.to("meta")
    assert gone.backend == "reference" and gone.levels.device.type == "meta"


def test_what_does_not_fit_is_refused_and_stays_as_it_was():
    made = PackedLinear.from_compressed(make_linear(24, 100), None, torch.float32)
    with pytest.raises(RecipeError, match="int8"):
        made.set_backend("cpu")
    with pytest.raises(RecipeError, match="backend is 'gpu'"):
        made.set_backend("gpu")
    assert made.backend == "reference" and made(torch.ones(1, 100)).isfinite().all()


def test_damaged_codes_are_refused_and_nothing_is_lost():
    made = module("reference", nm=(6, 8))
    made.mask.data.fill_(255)
    with pytest.raises(FormatError, match="mask"):
        made.set_backend("cpu")
    assert made.backend == "reference"


def test_gradients_pass_through_to_the_activations():
    inputs = x(2).requires_grad_()
    module()(inputs).sum().backward()
    wanted = x(2).requires_grad_()
    module("reference")(wanted).sum().backward()
    assert close(inputs.grad, wanted.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_gradients_are_rounded_once(dtype):
    """However many panels of rows they are summed over."""
    linear = make_int8(9000, 256, nm=None, salient=None, levels=("free", 6))
    made = PackedLinear.from_compressed(linear, None, dtype)
    made.set_backend("cpu")
    inputs = torch.zeros(1, 256, dtype=dtype, requires_grad=True)
    grad = torch.randn(1, 9000, generator=torch.Generator().manual_seed(0)).to(dtype)
    made(inputs).backward(grad)
    wanted = (grad.double() @ linear.dequantize().double()).to(dtype)
    assert (inputs.grad != wanted).float().mean() < 0.01  # float32's own rounding may tip a few


@pytest.mark.parametrize("batch", [1, 20])
def test_torch_compile(batch):
    made = module()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x(batch)), made(x(batch)))


def test_torch_compile_with_gradients():
    made, inputs = module(), x(3).requires_grad_()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(inputs).square().sum(), inputs)
    (wanted,) = torch.autograd.grad(made(inputs).square().sum(), inputs)
    assert torch.equal(found, wanted)


def test_many_gradients_at_once_and_gradients_of_gradients():
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(module(), x(2), vectorize=True)
    wanted = jacobian(module("reference"), x(2), vectorize=True)
    assert close(found, wanted)

    def twice(made):
        inputs = x(2).requires_grad_()
        (once,) = torch.autograd.grad(made(inputs).pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(once.square().sum(), inputs)[0]

    assert close(twice(module()), twice(module("reference")), 1e-3)


def test_another_default_device_changes_nothing():
    wanted, made = module(), module("reference")
    with torch.device("meta"):
        made.set_backend("cpu")
        dense = made.dequantize()
        made.half()
    assert made.backend == "cpu" and torch.equal(made.tiles, wanted.tiles)
    assert torch.equal(dense, wanted.dequantize())
    with torch.device("meta"):
        made.set_backend("reference")
    assert torch.equal(made.dequantize(), dense)


def test_weights_are_not_decoded_to_where_there_is_no_memory():
    made = module()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="FakeTensor"):
        made.dequantize()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_activations_without_fractions_are_refused(backend, dtype):
    with pytest.raises(ValueError, match="floating-point"):
        module(backend)(torch.ones(2, 200, dtype=dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backend_chosen_in_inference_mode_passes_gradients(backend):
    made = module("reference" if backend == "cpu" else "cpu")
    with torch.inference_mode():
        made.set_backend(backend)
    inputs = x(2).requires_grad_()
    made(inputs).sum().backward()
    assert inputs.grad.isfinite().all()


class Watching(TorchDispatchMode):
    """A mode such as profilers and counters have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode, Watching])
def test_a_plain_product_goes_past_the_dispatcher(mode, monkeypatch):
    made, inputs, ways = module(), x(1), []
    wanted = made(inputs)
    operator = op.b3_linear_no_grad

    def seen(*args):
        ways.append("operator")
        return operator(*args)

    monkeypatch.setattr(op, "b3_linear_no_grad", seen)
    with mode():
        assert torch.equal(made(inputs), wanted)
    assert ways == (["operator"] if mode is Watching else [])


@torch.no_grad()
def test_what_somebody_watches_is_not_plain():
    inputs, found = x(1), {}
    assert op._is_plain(inputs) and op._is_plain(inputs.bfloat16() + 1)

    def note(name):
        def look(inputs):
            found[name] = op._is_plain(inputs)
            return inputs + 1

        return look

    make_fx(note("make_fx"))(inputs)
    torch.vmap(note("vmap"))(inputs)
    torch.func.jvp(note("jvp"), (inputs,), (inputs,))
    torch.func.functionalize(note("functionalize"))(inputs)
    torch.jit.trace(note("trace"), inputs, check_trace=False)
    with FakeTensorMode() as mode:
        note("fake")(mode.from_tensor(inputs))
        note("under a fake mode")(torch.ones(2))
    with torch.profiler.profile():
        note("profiled")(inputs)
    with torch.device("meta"):
        note("under a function mode")(inputs)
    note("meta")(inputs.to("meta"))
    note("lazily negated")(torch._neg_view(inputs))
    note("subclass")(inputs.as_subclass(type("Own", (torch.Tensor,), {})))
    assert len(found) == 12 and not any(found.values()), found


def test_a_tracer_sees_the_operator():
    """And not what it returned once, as a constant."""
    traced = make_fx(module())(x(1))
    assert "subbit.b3_linear" in traced.code
    assert torch.equal(traced(3 * x(1)), module()(3 * x(1)))


@pytest.mark.parametrize("way", [lambda m: make_fx(m)(x(2)), torch.vmap], ids=["traced", "vmap"])
def test_gradients_pass_through_what_hides_that_they_are_wanted(way):
    inputs, wanted = x(2).requires_grad_(), x(2).requires_grad_()
    way(module())(inputs).square().sum().backward()
    module("reference")(wanted).square().sum().backward()
    assert close(inputs.grad, wanted.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_derivatives(grad):
    direction = x(3).flip(0)

    def product(made):
        def function(inputs):
            with torch.set_grad_enabled(grad):
                return made(inputs).square()

        return torch.func.jvp(function, (x(3),), (direction,))

    for found, wanted in zip(product(module()), product(module("reference")), strict=True):
        assert close(found, wanted)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(x(3), direction)
        tangent = forward_ad.unpack_dual(module()(dual)).tangent
        assert forward_ad.unpack_dual(module()(x(3))).tangent is None
    assert close(tangent, direction @ module().dequantize().T)


def test_a_jacobian_by_forward_mode_and_a_product_of_the_hessian():
    W = module().dequantize()
    assert close(torch.func.jacfwd(module())(x(2))[1, :, 1], W)
    inputs, direction = x(2).requires_grad_(), x(2).flip(0)
    with forward_ad.dual_level():
        y = module()(forward_ad.make_dual(inputs, direction)).square().sum()
        (grad,) = torch.autograd.grad(forward_ad.unpack_dual(y).tangent, inputs)
    assert close(grad, 2 * direction @ W.T @ W, 2e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bias_may_be_a_plain_attribute(backend):
    """As in the replicas of `nn.DataParallel`."""
    replica = module(backend)
    before = replica(x(2))
    replica.bias = replica._parameters.pop("bias").data
    assert torch.equal(replica(x(2)), before)


AUTOCAST = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])


@AUTOCAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_under_autocast_it_is_a_linear(low, dtype):
    """Dtypes are those of `nn.Linear`, and so is the result of the reference."""
    own = torch.float64 if dtype == torch.float64 else torch.float32
    dense = torch.nn.Linear(200, 40, dtype=own).requires_grad_(False)
    dense.weight.copy_(module().dequantize())
    dense.bias.copy_(module().bias)
    with torch.autocast("cpu", low):
        wanted = dense(x(3, dtype=dtype))
        assert torch.equal(module("reference")(x(3, dtype=dtype)), wanted)
        y = module()(x(3, dtype=dtype))
    assert y.dtype == wanted.dtype
    assert close(y.double(), wanted.double(), 2e-2)


@AUTOCAST
def test_autocast_changes_no_packed_tensor(low):
    wanted = module("reference").state_dict()
    with torch.autocast("cpu", low):
        made = module()
        state = made.state_dict()
        made.load_state_dict(state)
        made.set_backend("reference")
    for found in (state, made.state_dict()):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@AUTOCAST
def test_torch_compile_under_autocast(low):
    made = module()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", low):
        assert torch.equal(compiled(x(2)), made(x(2)))
    assert torch.equal(compiled(x(2)), made(x(2)))


def test_without_kernels_the_layout_still_works(monkeypatch):
    from subbit.packed.kernels import native

    monkeypatch.setattr(native, "_isa", lambda: "torch")
    assert close(module()(x(3)), module("reference")(x(3)), 1e-6)
