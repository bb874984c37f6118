"""The transformers quantizer: puts packed modules in place before the weights are loaded."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from subbit.errors import FormatError, ModelError
from subbit.hub.backend import choose_on_load
from subbit.hub.config import QUANT_METHOD, SubbitConfig
from subbit.hub.headers import TensorInfo, read_header
from subbit.packed.linear import PackedLinear, packed_modules
from subbit.packed.pack import AnyLayout

__all__ = ["SubbitQuantizer", "attach", "dense_shape", "register"]

_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16}


def register() -> None:
    """Add the packed format to the tables of transformers; doing it again changes nothing."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(SubbitConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(SubbitQuantizer)


def dense_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return `(rows, cols)` = (outputs, inputs) of a dense linear, or None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def attach(model: nn.Module, config: SubbitConfig) -> None:
    """Tell a model that holds packed modules what it is, so that its `save_pretrained` works."""
    model.config.quantization_config = config
    model.hf_quantizer = SubbitQuantizer(config)


class SubbitQuantizer(HfQuantizer):
    """Loads and saves models whose linears are `PackedLinear`; it does not compress on load."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        layouts = self.quantization_config.layouts()
        _check_stored(layouts, checkpoint_files)
        for name, (layout, bias) in layouts.items():
            _swap(model, _local_name(model, name), layout, bias)
        guard = self.quantization_config.guard_key
        if guard is not None:
            known = model._keys_to_ignore_on_load_unexpected or ()
            name = _local_name(model, guard.removesuffix(".weight"))
            model._keys_to_ignore_on_load_unexpected = {*known, rf"{re.escape(name)}\.weight$"}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in packed_modules(model).values():
            module.requires_grad_(False)  # the loader turns gradients on for every float tensor
        choose_on_load(model)
        if not model.is_remote_code():
            # A later save_pretrained would not write the code that auto_map speaks of.
            auto_map = getattr(model.config, "auto_map", None) or {}
            if any("modeling_subbit." in str(target) for target in auto_map.values()):
                del model.config.auto_map
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """Return the tensors to save: the model's own and the guard (`SubbitConfig.guard_key`)."""
        state = model.state_dict()
        guard = self.quantization_config.guard_key
        if guard is not None:
            version = self.quantization_config.format_version
            state[guard] = torch.tensor([version], dtype=torch.uint8)
        return state, {}

    def is_serializable(self) -> bool:
        """A packed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes cannot be trained."""
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        config = copy.deepcopy(model.config)
        del config.quantization_config
        with torch.device("meta"):
            skeleton = type(model)(config)  # tells nn.Linear from Conv1D
        for name, packed in packed_modules(model).items():
            dense = skeleton.get_submodule(name)
            weight = packed.dequantize().to(dtype or torch.float32)
            weight = weight.T.contiguous() if isinstance(dense, Conv1D) else weight
            dense.weight = nn.Parameter(weight, requires_grad=False)
            if packed.bias is not None:
                dense.bias = nn.Parameter(packed.bias.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, dense.train(packed.training))
        return model


def _local_name(model: nn.Module, name: str) -> str:
    """The name of a listed module within `model`, which may be the base model without its head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ModelError(
        f"config.json lists '{name}' as packed, but {type(model).__name__} has no such module; "
        "load the folder with the class that config.json names."
    )


def _swap(model: nn.Module, name: str, layout: AnyLayout, bias: bool) -> None:
    """Put an empty packed linear on the meta device in the place of a dense one."""
    dense = model.get_submodule(name)
    shape = layout.rows, layout.cols
    if dense_shape(dense) != shape or (dense.bias is not None) != bias:
        raise ModelError(
            f"config.json says that '{name}' is a packed linear of shape {shape} "
            f"{'with' if bias else 'without'} bias, but the model has {dense} there."
        )
    packed = PackedLinear(layout, bias=bias, dtype=dense.weight.dtype, device=dense.weight.device)
    model.set_submodule(name, packed.train(dense.training))
    _skip_initialisation(model, name)


def _skip_initialisation(model: nn.Module, name: str) -> None:
    """Keep transformers from initialising a packed linear through the modules around it.

    It calls `_init_weights` on every module without its mark, and GPT-2's reaches for the weight of
    a linear from the block that holds it. Modules with tensors of their own are left alone.
    """
    parts = name.split(".")
    for depth in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:depth]))
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own or isinstance(module, PackedLinear):
            module._is_hf_initialized = True


def _check_stored(layouts: dict[str, tuple[AnyLayout, bool]], files: list[str] | None) -> None:
    """Refuse shards in which a packed tensor is missing or is not what its layout says.

    transformers would fill a missing tensor with noise and only warn.
    """
    if not files:
        return
    stored: dict[str, TensorInfo] = {}
    for file in files:
        stored |= read_header(Path(file)).tensors
    for name, (layout, _) in layouts.items():
        for field, (shape, dtype) in layout.fields().items():
            info = stored.get(f"{name}.{field}")
            if info is None:
                raise FormatError(
                    f"the tensor '{name}.{field}' is missing from the checkpoint in "
                    f"{Path(files[0]).parent}; copy or download it again."
                )
            if info.shape != tuple(shape) or _DTYPES.get(info.dtype) != dtype:
                raise FormatError(
                    f"{info.file} holds '{name}.{field}' as {info.dtype} {info.shape}, but its "
                    f"layout says {dtype} {tuple(shape)}; copy or download it again."
                )


register()
