"""The torch operator `subbit::b3_linear`: `y = x Wᵀ` with W in the resident layouts B3 or B2.

`subbit::b3_linear_no_grad` is the same without a derivative, for `torch.no_grad()`. Where there is
one, torch decides in Python whether it is wanted, which takes as long as a small product.
Tangents of forward-mode AD are lost in both operators; `multiply_dual` has them. The derivative is
an operator of its own, `subbit::b3_input_grad`, which `torch.compile` need not look into.

`multiply` is what a linear calls. Where nobody could tell the difference it goes past torch's
dispatcher, which takes half as long as the product of a small model's linear.

Few vectors go through the compiled kernel, which reads the codes themselves; with AMX any number
does. More, or any number without a compiled kernel, are multiplied by torch with panels of 512
decoded rows for each thread, 2048 at most: one panel is written again and again, so that much of it
stays in the cache and its pages are asked for once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subbit.packed.kernels import native
from subbit.packed.kernels.layout import check_sizes, dense_rows

__all__ = ["b3_linear", "b3_linear_no_grad", "decode", "multiply"]

_PANEL_ROWS, _MOST_PANEL_ROWS = 512, 2048

_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPERATORS = torch.library.Library("subbit", "DEF")
_SIGNATURE = "(Tensor x, Tensor tiles, Tensor flags, int rows, int cols, int planes) -> Tensor"
_GRAD_SIGNATURE = "(Tensor grad, Tensor tiles, Tensor flags, int rows, int cols) -> Tensor"


def decode(
    tiles: Tensor,
    flags: Tensor,
    rows: int,
    cols: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Rows `start:stop` (`start` a multiple of 16) of W: `dtype` `(stop - start, cols)`.

    Args:
        out: where to write them, contiguous; None = a new tensor. Use what is returned.
    """
    if tiles.device.type == "cpu":
        own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if out is None or own != dtype:
            out = torch.empty(stop - start, cols, dtype=own, device=tiles.device)
        if native.dense(tiles, flags, rows, cols, start, stop, out):
            return out.to(dtype)
    return dense_rows(tiles, flags, rows, cols, start, stop, dtype)


def _panels(rows: int) -> list[tuple[int, int]]:
    """torch shares out the rows of a product, and does not divide too few of them."""
    step = min(_PANEL_ROWS * torch.get_num_threads(), _MOST_PANEL_ROWS)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _multiply(x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int, planes: int) -> Tensor:
    if x.is_cpu and x.dtype in _COMPILED_DTYPES:
        own = x.float() if x.dtype == torch.float16 else x
        y = native.linear(own.contiguous(), tiles, flags, rows, cols, planes)
        if y is not None:  # `to` is dear even where it does nothing, and this runs for every token
            return y if y.dtype == x.dtype else y.to(x.dtype)
    if x.shape[-1] != cols or not x.is_floating_point():
        raise ValueError(
            f"x {tuple(x.shape)} of {x.dtype} does not fit a linear ({rows}, {cols}), whose "
            "activations are floating-point."
        )
    check_sizes(tiles, flags, rows, cols)
    flat = x.reshape(-1, cols)
    y = x.new_empty(flat.shape[0], rows)
    panels = _panels(rows)
    room = x.new_empty(panels[0][1], cols)
    for start, stop in panels:
        panel = decode(tiles, flags, rows, cols, start, stop, x.dtype, room[: stop - start])
        torch.mm(flat, panel.T, out=y[:, start:stop])
    return y.view(*x.shape[:-1], rows)


def _multiply_on_gpu(
    x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int, planes: int
) -> Tensor:
    """Triton's kernels, which round no activations; panels without Triton, and for float64."""
    try:
        from subbit.packed.kernels import triton_kernels
    except ImportError:
        triton_kernels = None
    if triton_kernels is None or x.dtype not in _COMPILED_DTYPES:
        return _multiply(x, tiles, flags, rows, cols, planes)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = triton_kernels.multiply(flat, tiles, flags, rows, cols)
    return y.view(*x.shape[:-1], rows)


def _shape_only(
    x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int, planes: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, tiles, flags, ctx.rows, ctx.cols, *_ = inputs
    ctx.save_for_backward(tiles, flags)


def _input_grad(grad: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int) -> Tensor:
    """`grad W`: `(..., rows)` -> `(..., cols)`, in the dtype of `grad`."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    y = grad.to(wide)  # a sum over panels must not be rounded after each of them
    out = y.new_zeros(*y.shape[:-1], cols)
    for start, stop in _panels(rows):
        out += y[..., start:stop] @ decode(tiles, flags, rows, cols, start, stop, wide)
    return out.to(grad.dtype)


def _input_grad_shape(grad: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights = *ctx.saved_tensors, ctx.rows, ctx.cols
    return torch.ops.subbit.b3_input_grad(grad, *weights), None, None, None, None, None


def _backward_again(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    weights = *ctx.saved_tensors, ctx.rows, ctx.cols
    return torch.ops.subbit.b3_linear(grad, *weights, 2), None, None, None, None


def multiply_dual(product: Callable[..., Tensor], x: Tensor, *weights: Tensor | int) -> Tensor:
    """`product(x, *weights)` under forward-mode AD, which cannot look into the operators.

    A product is linear in x: its tangent is the product of the tangent of x.

    Args:
        product: one of the operators.
    """
    value, tangent = forward_ad.unpack_dual(x)
    y = product(value, *weights)
    return y if tangent is None else forward_ad.make_dual(y, product(tangent, *weights))


for _name in ("b3_linear", "b3_linear_no_grad"):
    _OPERATORS.define(_name + _SIGNATURE)
    _OPERATORS.impl(_name, _multiply, "CPU")
    _OPERATORS.impl(_name, _multiply_on_gpu, "CUDA")
    torch.library.register_fake(f"subbit::{_name}", _shape_only, lib=_OPERATORS)
torch.library.register_autograd("subbit::b3_linear", _backward, setup_context=_keep, lib=_OPERATORS)

_OPERATORS.define("b3_input_grad" + _GRAD_SIGNATURE)
_OPERATORS.impl("b3_input_grad", _input_grad, "CPU")
_OPERATORS.impl("b3_input_grad", _input_grad, "CUDA")
torch.library.register_fake("subbit::b3_input_grad", _input_grad_shape, lib=_OPERATORS)
torch.library.register_autograd(
    "subbit::b3_input_grad", _backward_again, setup_context=_keep, lib=_OPERATORS
)

b3_linear = torch.ops.subbit.b3_linear
"""`(x, tiles, flags, rows, cols, planes) -> y`: x `(..., cols)`, y `(..., rows)`, same dtype."""

b3_linear_no_grad = torch.ops.subbit.b3_linear_no_grad
"""The same under `torch.no_grad()`; what is traced there has no gradient later on either."""


def _other_keys(*names: str) -> int:
    """Bits of all dispatch keys but these."""
    known = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        known |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return ~known.raw_repr()


try:  # torch gives these names to nobody to rely on; without one of them no product is plain
    _NOT_OF_TENSOR = _other_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _NOT_OF_THREAD = _other_keys("BackendSelect", "ADInplaceOrView")
    _tensor_keys = torch._C._dispatch_keys
    _thread_keys = torch._C._dispatch_tls_local_include_set
    _function_modes = torch._C._len_torch_function_stack
    _profiler_enabled = torch.autograd._profiler_enabled
except AttributeError:
    _tensor_keys = None


def _is_plain(x: Tensor) -> bool:
    """Whether torch has nothing to do around a product of x but to call it, gradients aside.

    Nothing to trace, batch, fake, count or profile, and no lazy minus sign to resolve: each of
    these is a key of the tensor or the thread, or is asked for. `torch.compile` sees False.
    """
    return (
        not torch.compiler.is_compiling()
        and _tensor_keys is not None
        and type(x) is Tensor
        and not _tensor_keys(x).raw_repr() & _NOT_OF_TENSOR
        and not _thread_keys().raw_repr() & _NOT_OF_THREAD
        and not _function_modes()
        and not _profiler_enabled()
    )


def multiply(x: Tensor, tiles: Tensor, flags: Tensor, rows: int, cols: int, planes: int) -> Tensor:
    """`(..., cols)` -> `(..., rows)`, in the dtype of x; differentiable in x in both modes.

    Not by the reverse mode of `torch.func`, which knows no operators with a derivative in Python.

    Args:
        tiles, flags: W `(rows, cols)` in a resident layout (`layout.py`).
        planes: of int8 that activations are rounded to: 2 (relative error <= 1e-4) or 1 (<= 1e-2).
    """
    weights = tiles, flags, rows, cols, planes
    # not by x.requires_grad: tracers and vmap hide that somebody will want the gradient
    wanted = torch.is_grad_enabled()
    # unpack_dual looks at no more; asked for here, it would cost a part of a small product
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return multiply_dual(b3_linear if wanted else b3_linear_no_grad, x, *weights)
    if wanted:
        return b3_linear(x, *weights)
    return _multiply(x, *weights) if _is_plain(x) else b3_linear_no_grad(x, *weights)
