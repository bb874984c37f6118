"""What can be said of a model's weights as a whole: are they finite, and which are they."""

import hashlib

import torch
from torch import Tensor, nn

from subbit.errors import NonFiniteError

__all__ = ["check_finite", "fingerprint"]


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in its weights.

    Raises:
        NonFiniteError: names the first such parameter and how many of its values are bad.
    """
    for name, parameter in model.named_parameters():
        finite = torch.isfinite(parameter.detach())
        if not finite.all():
            bad = parameter.numel() - int(finite.sum())
            raise NonFiniteError(
                f"{name} has {bad} NaN or Inf values among its {parameter.numel()}; "
                "the checkpoint is damaged, or its values overflow the dtype it was loaded in: "
                "fetch it again or load it in float32"
            )


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters and persistent buffers of `model`.

    Covers names, shapes, dtypes and raw bytes; tied parameters count once, under their first
    name. The same model gives the same answer on every device and in every process.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_stored_tensors(model).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        # numpy has no bfloat16: hash the bytes, whatever they mean
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update((name, b) for name, b in model.named_buffers() if name in persistent)
    return tensors
