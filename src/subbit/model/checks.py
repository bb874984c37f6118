"""Refuse what cannot be compressed: quantised, incomplete, or no causal LM."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subbit.errors import ModelError

__all__ = ["check_complete", "check_declared", "check_kind"]


def check_declared(config: dict[str, Any], source: str, trust_remote_code: bool) -> None:
    """Refuse what config.json says is quantised, or needs code that the user has not trusted."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        what = "compressed by subbit" if method == "subbit" else f"quantised (method '{method}')"
        raise ModelError(f"'{source}' is already {what}; give the original model in 16 or 32 bits")
    own_code = "AutoModelForCausalLM" in config.get("auto_map", {})
    if own_code and not trust_remote_code and config.get("model_type") not in _known_types():
        raise ModelError(
            f"'{source}' needs model code of its own; read it, and if you trust it pass "
            "trust_remote_code=True"
        )


def check_kind(config: PreTrainedConfig, source: str) -> None:
    """Refuse a model that is not a causal LM."""
    names = list(config.architectures or [])
    known = _known_types().get(config.model_type, ())
    causal = any(name in known or name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if getattr(config, "is_encoder_decoder", False) or (names and not causal):
        what = names[0] if names else f"{config.model_type} encoder-decoder"
        raise ModelError(f"'{source}' holds a {what}, which is not a causal LM")


def _known_types() -> dict[str, tuple[str, ...]]:
    """Return model type -> class names of its causal LMs."""
    return {
        kind: (names,) if isinstance(names, str) else tuple(names)
        for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def check_complete(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    """Refuse a model some of whose weights were not in the checkpoint, hence random."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(set(info["missing_keys"]) - set(tied))
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    for names, fault in ((missing, "lacks"), (mismatched, "has other shapes for")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the checkpoint '{source}' {fault} weights that a {type(model).__name__} needs: "
                f"{', '.join(names[:3])}{more}; it is incomplete, or its config.json is not its own"
            )
