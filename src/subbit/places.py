"""What users call devices and dtypes, judged before anything is loaded."""

import torch

from subbit.errors import RecipeError, nearest

__all__ = ["DTYPES", "parse_device", "parse_dtype"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine; "auto" = the GPU if there is one, else the CPU.

    Raises:
        RecipeError: the device is unknown, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise RecipeError(f"unknown device '{device}'; use auto, cpu, cuda or cuda:N") from None
    accelerator = torch.accelerator.current_accelerator()
    there = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    count = 1 if place.type == "cpu" else torch.accelerator.device_count()
    if place.type not in there or (place.index or 0) >= count:
        raise RecipeError(f"device '{device}' is not available on this machine; use --device cpu")
    return place


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Return the dtype that a model is to run in, or "auto": the checkpoint's own.

    Raises:
        RecipeError: an unknown name, or a dtype without fractions.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return name
    if name not in DTYPES and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise RecipeError(f"unknown dtype '{name}'{nearest(name, DTYPES)}")
    return getattr(torch, name)
