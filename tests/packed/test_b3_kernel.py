"""The operator: every instruction set that this processor has means the same weights."""

import os
import shutil
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from int8_examples import make_int8, resident_linears

from subbit.binarize import descent
from subbit.errors import RecipeError, SubbitError
from subbit.packed import kernels, pack
from subbit.packed.kernels import kernel_name, native, op
from subbit.packed.kernels.layout import expand
from subbit.packed.kernels.op import b3_linear, b3_linear_no_grad, decode

ISAS = ("portable", "avx2", "avxvnni", "avx512", "amx", "neon", "neondot")
RANGE = {1: 127, 2: 32512}  # steps of the largest activation of a block


@pytest.fixture
def choose_isa(monkeypatch):
    """Set `SUBBIT_ISA`, and have it read."""

    def choose(name):
        monkeypatch.setenv("SUBBIT_ISA", name)
        native._isa.cache_clear()

    yield choose
    monkeypatch.undo()
    native._isa.cache_clear()


@pytest.fixture(params=ISAS)
def isa(request, choose_isa, monkeypatch):
    if native.kernel_name() == "torch":
        pytest.skip("the kernels are not compiled here; pip install -e . compiles them")
    choose_isa(request.param)
    monkeypatch.setattr(native, "worthwhile", lambda isa, dtype: 200)
    try:
        return kernel_name()
    except RecipeError:
        pytest.skip(f"this processor has no {request.param}")


KINDS = {
    "three bits": {},
    "two bits": {"levels": ("free", 4), "salient": None, "nm": None},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def resident(linear):
    return expand(*pack(linear))


def tolerance(x, W, planes):
    """Largest error of each output that rounding the activations can make, and float32's."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 128)).view(len(x), -1, 128)
    largest = padded.abs().amax(-1).repeat_interleave(128, -1)[:, : x.shape[1]]
    rounding = 0.51 * largest / RANGE[planes]
    return (rounding + 2e-6 * x.double().abs()) @ W.double().abs().T + 1e-30


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    linear=resident_linears(),
    batch=st.sampled_from([*range(1, 20), 33, 64, 66, 70]),
    planes=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_fuzzed_shapes(isa, linear, batch, planes, seed):
    rows, cols = linear.shape
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(seed))
    tiles, flags = resident(linear)
    W = linear.dequantize()
    y = b3_linear(x, tiles, flags, rows, cols, planes)
    error = (y.double() - x.double() @ W.double().T).abs()
    scale = linear.levels.scale.expand(linear.levels.params.shape[:2]).double()
    scale = scale.repeat_interleave(linear.group_size, 1)[:, :cols]
    # Sums of (level + 128) x and of -128 x are rounded to float32 before they meet, with one plane
    # once there are several blocks: a row of zeros need not give exactly 0.
    allowed = tolerance(x, W, planes) + 383 * 2.0**-24 * (x.double().abs() @ scale.T)
    assert (error <= allowed).all()


@pytest.mark.parametrize(("planes", "bound"), [(2, 1e-4), (1, 1e-2)])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 16, 40, 67])
@kinds
def test_relative_error(isa, kind, planes, bound, batch):
    rows, cols = 256, 576
    linear = make_int8(rows, cols, seed=5, **kind)
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(batch))
    wanted = x.double() @ linear.dequantize().double().T
    y = native.linear(x, *resident(linear), rows, cols, planes)
    assert y is not None and (y - wanted).norm() <= bound * wanted.norm()


@kinds
def test_instruction_sets_agree(isa, kind, choose_isa):
    rows, cols = 148, 450
    x = torch.randn(11, cols, generator=torch.Generator().manual_seed(1))
    weights = resident(make_int8(rows, cols, seed=2, **kind))
    y = b3_linear(x, *weights, rows, cols, 2)
    choose_isa("portable")
    other = b3_linear(x, *weights, rows, cols, 2)
    assert (y - other).norm() <= 1e-6 * other.norm()


@kinds
def test_dense_panels_are_the_reference_bit_for_bit(isa, kind):
    for rows, cols in ((33, 320), (16, 64), (5, 77), (1, 1), (20, 600)):
        linear = make_int8(rows, cols, seed=rows, **kind)
        tiles, flags = resident(linear)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found = decode(tiles, flags, rows, cols, 0, rows, dtype)
            assert torch.equal(found, linear.dequantize().to(dtype))
    assert torch.equal(decode(tiles, flags, 20, 600, 16, 20, dtype), linear.dequantize()[16:])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(linear=resident_linears(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_fuzzed_panels(isa, linear, dtype):
    rows, cols = linear.shape
    tiles, flags = resident(linear)
    wanted = linear.dequantize().to(dtype)
    for start in range(0, rows, 16):
        room = torch.full((rows - start + 1, cols), 7.0, dtype=dtype)  # the last row is a guard
        part = decode(tiles, flags, rows, cols, start, rows, dtype, room[:-1])
        assert torch.equal(part, wanted[start:])
        assert (room[-1] == 7).all()


def test_extreme_weights_and_activations(isa):
    """Levels of -127 and activations of one sign: the largest sums that integers must hold."""
    linear = make_int8(16, 128, nm=None, salient=None)
    linear.levels.params.fill_(-127)
    linear.levels.scale.fill_(1)
    linear.codes.clamp_(min=1)
    tiles, flags = resident(linear)
    for x in (torch.full((1, 128), -3.0), torch.full((1, 128), 1e20)):
        y = b3_linear(x, tiles, flags, 16, 128, 2)
        torch.testing.assert_close(y, x @ linear.dequantize().T, rtol=1e-5, atol=0)
    assert (b3_linear(torch.zeros(1, 128), tiles, flags, 16, 128, 2) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(isa, value):
    x = torch.zeros(2, 200)
    x[1, 150] = value
    y = b3_linear(x, *resident(make_int8(10, 200)), 10, 200, 2)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()


PROMPT = 65  # so many bfloat16 vectors AMX multiplies as bfloat16, with weights rounded as torch's


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    linear=resident_linears(),
    batch=st.sampled_from([PROMPT, 79, 80, 81, 97, 128]),
    seed=st.integers(0, 9),
)
def test_fuzzed_prompts_in_bfloat16(isa, linear, batch, seed):
    rows, cols = linear.shape
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()
    W = linear.dequantize().double()
    y = b3_linear(x, *resident(linear), rows, cols, 2)
    wanted = x.double() @ W.T
    allowed = 2.0**-8 * (x.double().abs() @ W.abs().T + wanted.abs())
    assert ((y.double() - wanted).abs() <= allowed + tolerance(x.float(), W, 2)).all()


@kinds
def test_a_long_prompt_is_as_many_short_ones(isa, kind, monkeypatch):
    monkeypatch.setattr(native, "worthwhile", lambda isa, dtype: 1000)
    rows, cols, length = 600, 320, 512 + 18  # 512 are multiplied at a time
    weights = resident(make_int8(rows, cols, seed=4, **kind))
    x = torch.randn(length, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = b3_linear(x, *weights, rows, cols, 2)
    for start in (0, 400, length - PROMPT):
        part = x[start : start + PROMPT]
        assert torch.equal(y[start : start + PROMPT], b3_linear(part, *weights, rows, cols, 2))


@kinds
def test_only_amx_rounds_the_weights_of_a_prompt(isa, kind):
    linear = make_int8(64, 256, seed=4, **kind)
    x = torch.randn(PROMPT, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = b3_linear(x, *resident(linear), 64, 256, 2)
    as_torch = (x.double() @ linear.dequantize().bfloat16().double().T).bfloat16()
    assert ((y == as_torch).float().mean() > 0.98) == (isa == "amx")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_part_of_a_prompt(isa, value):
    x = torch.zeros(PROMPT, 200, dtype=torch.bfloat16)
    x[1, 150] = value
    y = b3_linear(x, *resident(make_int8(10, 200)), 10, 200, 2)
    assert not y[1].isfinite().any()
    assert (y[0] == 0).all() and (y[2:] == 0).all()


def test_larger_batches_go_through_in_parts(isa):
    weights = resident(make_int8(30, 200, seed=4))
    x = torch.randn(37, 200, generator=torch.Generator().manual_seed(0))
    y = b3_linear(x, *weights, 30, 200, 1)
    single = torch.cat([b3_linear(row, *weights, 30, 200, 1) for row in x.split(1)])
    assert (y - single).norm() <= 1e-6 * single.norm()  # 1e-2 from what panels would give


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [3, 40])
def test_half_precision(isa, dtype, batch, monkeypatch):
    monkeypatch.setattr(native, "worthwhile", lambda isa, dtype: 16)  # 40 go through panels
    linear = make_int8(64, 256, seed=4)
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = b3_linear(x, *resident(linear), 64, 256, 2)
    wanted = x.float() @ linear.dequantize().T
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() <= 1e-2 * wanted.norm()
    if batch <= 16:  # with one plane less than a third of them
        rounded_once = b3_linear(x.float(), *resident(linear), 64, 256, 2).to(dtype)
        assert (y == rounded_once).float().mean() > 0.9


@pytest.mark.parametrize(("batch", "dtype"), [(5, torch.float32), (PROMPT, torch.bfloat16)])
def test_threads_change_nothing(isa, batch, dtype):
    weights = resident(make_int8(1000, 1024, seed=7))
    x = torch.randn(batch, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(b3_linear(x, *weights, 1000, 1024, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64), (2, 0, 64), (2, 30, 64)])
def test_leading_dimensions(isa, shape):
    linear = make_int8(7, 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = b3_linear(x, *resident(linear), 7, 64, 2)
    assert y.shape == (*shape[:-1], 7)
    torch.testing.assert_close(y, x @ linear.dequantize().T, rtol=1e-3, atol=1e-3)


def test_activations_in_any_memory_order(isa):
    linear = make_int8(7, 64)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).T
    y = b3_linear(x, *resident(linear), 7, 64, 2)
    assert torch.equal(y, b3_linear(x.contiguous(), *resident(linear), 7, 64, 2))


def test_wrong_sizes_never_reach_the_kernel(isa):
    tiles, flags = resident(make_int8(40, 200))
    x = torch.randn(1, 200)
    for bad in (
        (x, tiles[:-1], flags, 40, 200, 2),
        (x, tiles, flags[:-1], 40, 200, 2),
        (x, tiles, flags, 400, 200, 2),
        (x, tiles, flags, 40, 201, 2),
        (x[:, 1:], tiles, flags, 40, 200, 2),
        (x, tiles.view(torch.int8), flags, 40, 200, 2),
        (x, tiles, flags.repeat(2)[::2], 40, 200, 2),
        (x, tiles, flags, 40, 200, 3),
        (x, tiles, flags, -40, 200, 2),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            b3_linear(*bad)


@kinds
def test_any_bytes_are_safe(isa, kind):
    """Codes and records of any value read nothing but their own table."""
    rng = torch.Generator().manual_seed(0)
    tiles, flags = resident(make_int8(40, 200, **kind))
    for _ in range(20):
        noise = torch.randint(0, 256, tiles.shape, generator=rng, dtype=torch.uint8)
        for batch in (1, 5, 20):
            assert b3_linear(torch.ones(batch, 200), noise, flags, 40, 200, 2).shape == (batch, 40)


def test_salient_flags_mean_nothing_in_two_bits(isa):
    tiles, flags = resident(make_int8(40, 200, **KINDS["two bits"]))
    flags[3] = 8
    with pytest.raises(SubbitError, match="sizes"):
        b3_linear(torch.ones(1, 200), tiles, flags, 40, 200, 2)


@pytest.mark.parametrize("flag", [1, 9, 16, 255])
def test_flags_of_other_values_reach_no_table(isa, flag):
    tiles, flags = resident(make_int8(40, 200))
    flags[3] = flag
    with pytest.raises(SubbitError, match="flags"):
        b3_linear(torch.ones(1, 200), tiles, flags, 40, 200, 2)
    with pytest.raises(SubbitError, match="flags"):
        decode(tiles, flags, 40, 200, 0, 40, torch.float32)


@kinds
def test_without_a_compiler_torch_does_it(monkeypatch, kind):
    monkeypatch.setattr(native, "_isa", lambda: "torch")
    linear = make_int8(40, 300, seed=3, **kind)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    y = b3_linear(x, *resident(linear), 40, 300, 2)
    torch.testing.assert_close(y, x @ linear.dequantize().T)


def test_gradients_of_the_activations():
    linear = make_int8(40, 300, seed=3)
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0), requires_grad=True)
    b3_linear(x, *resident(linear), 40, 300, 2).square().sum().backward()
    y = x.detach() @ linear.dequantize().T
    wanted = 2 * y @ linear.dequantize()
    assert (x.grad - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("operator", [b3_linear, b3_linear_no_grad], ids=["grad", "no grad"])
def test_the_operators_keep_torchs_rules(operator):
    rules = ["test_schema", "test_faketensor"]
    if operator is b3_linear:
        rules += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    linear = make_int8(16, 128)
    x = torch.randn(2, 128, requires_grad=operator is b3_linear)
    args = (x, *resident(linear), 16, 128, 2)
    torch.library.opcheck(operator.default, args, test_utils=rules)


def test_names(monkeypatch, choose_isa):
    monkeypatch.setenv("SUBBIT_KERNEL", "off")
    assert kernel_name() == "reference"
    monkeypatch.setenv("SUBBIT_KERNEL", "of")
    with pytest.raises(RecipeError, match="on or off"):
        kernel_name()
    monkeypatch.setenv("SUBBIT_KERNEL", "on")
    choose_isa("avx521")
    with pytest.raises(RecipeError, match="did you mean 'avx512'"):
        kernel_name()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")
def test_where_there_is_a_compiler_its_work_is_there():
    """An extension that does not compile is left out in silence, and tests of it are skipped."""
    assert native._library() is not None and descent.is_compiled()


def test_reading_reads_everything(isa):
    words = torch.zeros(1 << 16, dtype=torch.int64)
    words[77777 // 8], words[-1] = 5, 9
    assert native.read(words) == native.read(words, streams=False) == 5 ^ 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_triton_panels_are_multiplied_where_the_weights_are(dtype, monkeypatch):
    """On a device that the CPU kernel cannot read, for want of a GPU the one without data."""
    linear = make_int8(40, 200)
    tiles, flags = (tensor.to("meta") for tensor in resident(linear))
    monkeypatch.setitem(sys.modules, "subbit.packed.kernels.triton_kernels", None)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)  # where another test has it
    decoded = []
    monkeypatch.setattr(op, "decode", lambda *args: (decoded.append(args), args[-1])[1])
    x = torch.ones(2, 3, 200, dtype=dtype, device="meta")
    y = op._multiply_on_gpu(x, tiles, flags, 40, 200, 2)
    assert y.shape == (2, 3, 40) and y.dtype == dtype and y.device.type == "meta"
    assert len(decoded) == 1
