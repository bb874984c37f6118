"""A linear layer that holds its packed bytes as parameters and decodes them to multiply."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subbit.codes import Compressed
from subbit.errors import RecipeError
from subbit.packed.codecs import unpack_bits
from subbit.packed.kernels import op
from subbit.packed.kernels.layout import collapse, expand, fits
from subbit.packed.pack import AnyLayout, decode_dense, pack, unpack
from subbit.packed.report import BitReport, bit_report

__all__ = ["BACKENDS", "PackedLinear", "dense_cache", "packed_modules"]

BACKENDS = ("reference", "cpu")

# Asked for at every product: torch's public question, device by device, takes several times as long
_autocast_anywhere = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


class PackedLinear(nn.Module):
    """`y = x Wᵀ + bias` with W held as the fields of a `Layout`.

    The fields are frozen parameters named as in `Layout.fields()`; they never change dtype, only
    device. `bias`, if any, follows the model's dtype.

    After `set_backend("cpu")` the module holds W in a resident layout instead (buffers `tiles`
    and `flags`), which the CPU kernel multiplies with. That is only how it works: the state dict
    has the packed fields as before, and moving the module off the CPU brings them back.

    Args:
        layout: which tensors, of which shapes.
        bias: whether there is a bias `(rows,)`.
        dtype: of the bias: the model's dtype.
        device: where to put the parameters, all zero until a state dict is loaded; None follows
            torch's default device, `meta` included.

    Attributes:
        keep_dense: False decodes the weight at every forward (smallest memory); True decodes it
            once and keeps it, in the dtype of x, outside the state dict, copies and pickles. It
            concerns the reference backend only.
        planes: 2 or 1, int8 planes of the activations in the kernel: a relative error of at most
            1e-4 or 1e-2. Prompts in bfloat16 may be multiplied as bfloat16 instead.
    """

    def __init__(
        self,
        layout: AnyLayout,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features = layout.cols
        self.out_features = layout.rows
        self.keep_dense = False
        self.planes = 2
        self._dense: Tensor | None = None
        for name, field in layout.fields().items():
            data = torch.zeros(field.shape, dtype=field.dtype, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        start = torch.zeros(layout.rows, dtype=dtype, device=device) if bias else None
        self.register_parameter(
            "bias", None if start is None else nn.Parameter(start, requires_grad=False)
        )

    @classmethod
    def from_compressed(
        cls, linear: Compressed, bias: Tensor | None, dtype: torch.dtype
    ) -> "PackedLinear":
        """Pack `linear` (see `pack` for errors) into a module on its device.

        Raises:
            ValueError: a bias that is not `(rows,)`.
        """
        layout, tensors = pack(linear)
        if bias is not None and tuple(bias.shape) != (layout.rows,):
            raise ValueError(f"bias must be ({layout.rows},), not {tuple(bias.shape)}.")
        module = cls(layout, bias is not None, dtype, device="meta")
        if bias is not None:
            device = next(iter(tensors.values())).device
            tensors["bias"] = bias.detach().to(device, dtype)
        for name, tensor in tensors.items():
            # a copy, so that the module shares no memory with what it was made from
            setattr(module, name, nn.Parameter(tensor.clone(), requires_grad=False))
        return module

    @property
    def backend(self) -> str:
        """What multiplies: "reference" or "cpu"."""
        return "reference" if self._buffers.get("tiles") is None else "cpu"

    def set_backend(self, backend: str) -> None:
        """Change how W is held and multiplied with, without loss: one of `BACKENDS`.

        Raises:
            RecipeError: an unknown backend, or one that this linear does not fit.
            FormatError: the packed bytes mean no valid linear.
        """
        if backend not in BACKENDS:
            raise RecipeError(f"backend is '{backend}'; use one of {', '.join(BACKENDS)}")
        if backend == self.backend:
            return
        self._dense = None
        # an inference tensor kept for later would be useless under autograd
        with torch.inference_mode(False), torch.no_grad():
            self._expand() if backend == "cpu" else self._collapse()

    def _expand(self) -> None:
        if not fits(self.layout) or self.levels.device.type != "cpu":
            raise RecipeError(
                "the CPU kernel takes linears on the CPU whose levels are int8 (levels: int8 in "
                f"the recipe), at most 8 a row and block (7 where weights are pruned), or 6 and 4 "
                f"salient ones; this is {self}"
            )
        tiles, flags = expand(self.layout, self.fields())
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("flags", flags, persistent=False)
        for name in self.layout.fields():
            setattr(self, name, None)

    def _collapse(self) -> None:
        fields = self.fields()
        del self.tiles, self.flags
        for name, tensor in fields.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def fields(self) -> dict[str, Tensor]:
        """The packed tensors by field name."""
        if self.backend == "cpu":
            return collapse(self.layout, self.tiles, self.flags)
        return {name: getattr(self, name) for name in self.layout.fields()}

    def compressed(self) -> Compressed:
        """Codes and levels, or values under a mask; FormatError if the bytes mean none."""
        return unpack(self.layout, self.fields())

    def dequantize(self) -> Tensor:
        """The dense weight, float32 `(rows, cols)`; FormatError if the bytes mean none."""
        return self._decode(torch.float32)

    def bits(self) -> BitReport:
        """How many bits a weight of this linear takes."""
        layout, kept = self.layout, None
        if getattr(layout, "zeros", False):  # only the codes tell how many weights are pruned
            kept = float(self.compressed().kept.float().mean())
        if self.backend == "cpu":
            return bit_report(layout, int(self.flags[:-1].count_nonzero()), kept)
        salient = self.fields().get("salient")
        columns = 0 if salient is None else int(unpack_bits(salient[None], 1, layout.cols).sum())
        return bit_report(layout, columns, kept)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of x, or of autocast: `(..., cols)` -> `(..., rows)`."""
        if _autocast_anywhere():
            x = _as_autocast_does(x)
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        buffers = self._buffers  # as attributes they would be found the long way
        tiles = buffers.get("tiles")
        if tiles is None:
            return nn.functional.linear(x, self._dense_weight(x.dtype), bias)
        y = op.multiply(
            x, tiles, buffers["flags"], self.out_features, self.in_features, self.planes
        )
        return y if bias is None else y + bias

    @property
    def kept(self) -> Tensor | None:
        """The dense weight that is kept (`keep_dense`), None where there is none yet."""
        return self._dense

    def drop_dense(self) -> None:
        """Keep no dense weight from now on and free the one that was kept."""
        self.keep_dense, self._dense = False, None

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        if not self.keep_dense:
            self._dense = None
            return self._decode(dtype)
        if self._dense is None or self._dense.dtype != dtype:
            self._dense = self._decode(dtype)
        return self._dense

    def _decode(self, dtype: torch.dtype) -> Tensor:
        if self.backend == "cpu":
            size = self.out_features, self.in_features
            return op.decode(self.tiles, self.flags, *size, 0, self.out_features, dtype)
        return decode_dense(self.layout, self.fields(), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self._dense = None
        if self.backend == "cpu":
            probe = fn(torch.empty(0, dtype=torch.uint8, device=self.tiles.device))
            if probe.device.type != "cpu":
                self.set_backend("reference")
        bias = self.bias

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is bias or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.backend == "cpu":
            for name, tensor in self.fields().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        backend = self.backend
        self.set_backend("reference")
        super()._load_from_state_dict(*args, **kwargs)
        self.set_backend(backend)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}

    def extra_repr(self) -> str:
        """Shape, structure and stored bits, for `print(model)`."""
        nm = "none" if self.layout.nm is None else "{}:{}".format(*self.layout.nm)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nm={nm}, "
            f"stored_bits={self.layout.bits_per_weight:.3f}, bias={self.bias is not None}, "
            f"backend={self.backend}"
        )


def _as_autocast_does(x: Tensor) -> Tensor:
    """The input of a linear in the dtype of autocast, where it is on for x; float64 stays."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    low = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if low else x


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Return dotted name -> packed linear, in the model's own order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@contextmanager
def dense_cache(module: nn.Module) -> Iterator[None]:
    """Let the packed linears within a module decode once for all that is run in between."""
    packed = packed_modules(module).values()
    for part in packed:
        part.keep_dense = True
    try:
        yield
    finally:
        for part in packed:
            part.drop_dense()
