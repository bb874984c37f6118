"""The Triton kernels against the reference: in Triton's interpreter here, on a GPU where one is."""

import os
import subprocess
import sys

import pytest
import torch
from int8_examples import make_int8

from subbit.packed import pack
from subbit.packed.kernels.layout import code_bits, expand

triton = pytest.importorskip("triton", reason="triton is not installed; pip install subbit[gpu]")
triton_kernels = pytest.importorskip("subbit.packed.kernels.triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def product(linear, x):
    tiles, flags = (tensor.to(DEVICE) for tensor in expand(*pack(linear)))
    return triton_kernels.multiply(x.to(DEVICE), tiles, flags, *linear.shape).cpu()


def activations(batch, cols, dtype=torch.float32):
    return torch.randn(batch, cols, generator=torch.Generator().manual_seed(batch)).to(dtype)


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 128), (1, 1), (37, 64), (70, 200), (20, 330), (130, 576)]
)
def test_products_are_those_of_the_reference(batch, rows, cols):
    linear = make_int8(rows, cols, seed=rows)
    x = activations(batch, cols)
    y, wanted = product(linear, x), x @ linear.dequantize().T
    assert y.shape == (batch, rows)
    assert (y - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 128), (1, 1), (37, 64), (70, 200), (20, 330), (130, 576)]
)
def test_products_with_two_bit_codes(batch, rows, cols):
    linear = make_int8(rows, cols, levels=("free", 3), salient=None, seed=rows)
    x = activations(batch, cols)
    assert code_bits(pack(linear)[0]) == 2
    y, wanted = product(linear, x), x @ linear.dequantize().T
    assert (y - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5])
def test_half_precision(dtype, batch):
    linear = make_int8(40, 200, seed=3)
    x = activations(batch, 200, dtype)
    y, wanted = product(linear, x), x.float() @ linear.dequantize().T
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("count", "salient", "nm"),
    [
        (6, None, None),
        (6, None, (2, 4)),
        (6, ("free", 4), None),
        (6, ("free", 4), (2, 4)),
        (7, None, (6, 8)),
        (8, None, None),
        (4, None, None),
        (3, None, (6, 8)),
        (2, None, (2, 4)),
    ],
)
def test_structures(count, salient, nm):
    linear = make_int8(24, 256, levels=("free", count), salient=salient, nm=nm, seed=1)
    x = activations(2, 256)
    wanted = x @ linear.dequantize().T
    assert (product(linear, x) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums that overflow
@pytest.mark.parametrize("count", [3, 6])
def test_any_bytes_are_safe(count):
    tiles, flags = expand(*pack(make_int8(40, 200, levels=("free", count), salient=None)))
    noise = torch.randint(0, 255, tiles.shape, generator=torch.Generator().manual_seed(0)).byte()
    for batch in (1, 3):
        x = torch.ones(batch, 200).to(DEVICE)
        y = triton_kernels.multiply(x, noise.to(DEVICE), flags.to(DEVICE), 40, 200)
        assert y.shape == (batch, 40)


def test_no_vectors_and_wrong_sizes():
    tiles, flags = (tensor.to(DEVICE) for tensor in expand(*pack(make_int8(40, 200))))
    x = torch.ones(0, 200).to(DEVICE)
    assert triton_kernels.multiply(x, tiles, flags, 40, 200).shape == (0, 40)
    for bad in ((tiles[1:], flags, 40, 200), (tiles, flags, 400, 200), (tiles, flags, 40, 201)):
        with pytest.raises(ValueError, match=r"fit|must be"):
            triton_kernels.multiply(x, *bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_operator_on_a_gpu():
    from subbit.packed.kernels.op import b3_linear

    linear = make_int8(70, 200, seed=2)
    tiles, flags = (tensor.cuda() for tensor in expand(*pack(linear)))
    x = activations(6, 200).view(2, 3, 200)
    y = b3_linear(x.cuda(), tiles, flags, 70, 200, 2).cpu()
    wanted = x @ linear.dequantize().T
    assert (y - wanted).norm() <= 1e-2 * wanted.norm()


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from subbit.packed.kernels import triton_kernels

def ptx(kernel, arguments, constants):
    types = dict(x="*bf16", y="*bf16", tiles="*u8", flags="*u8")
    names = [*arguments, *constants]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

weights = ["rows", "cols", "full", "stride"]
for bits, half in ((3, True), (3, False), (2, True)):
    constants = {"HALF": half, "BITS": bits}
    assert ptx(triton_kernels.gemv_kernel, ["x", "tiles", "flags", "y", *weights], constants)
    code = ptx(
        triton_kernels.gemm_kernel,
        ["x", "tiles", "flags", "y", "batch", *weights, "strips"],
        constants | {"DOT": tl.bfloat16, "ROWS": 64, "VECTORS": 32},
    )
    assert "mma" in code  # tensor cores
"""


def test_they_compile_for_a_gpu_that_is_not_here(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
