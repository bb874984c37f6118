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
    own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if own_code and not trust_remote_code and config.get("model_type") not in _known_types():
        raise ModelError(
            f"'{source}' needs model code of its own; read it, and if you trust it load the model "
            "with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) and give that "
            "to subbit.compress with its tokenizer"
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
    """Refuse a model that is not what the checkpoint holds.

    Weights that were not in the checkpoint are random; of a part that the model has, such as a
    linear, none may be left over (a bias for which config.json has no place). What belongs to parts
    that a causal LM has not, such as another head, is left out, as transformers does.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(set(info["missing_keys"]) - set(tied))
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    unused = sorted(key for key in info["unexpected_keys"] if _belongs_to_a_part(key, model))
    kind = f"weights that a {type(model).__name__}"
    for names, fault in (
        (missing, f"lacks {kind} needs"),
        (mismatched, f"has other shapes for {kind} needs"),
        (unused, f"has {kind} with its config.json has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the checkpoint '{source}' {fault}: {', '.join(names[:3])}{more}; it is "
                "incomplete, or its config.json is not its own"
            )


def _belongs_to_a_part(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor's name is that of a linear, norm or embedding of the model, and one more."""
    parent, prefix = key.rpartition(".")[0], f"{model.base_model_prefix}."
    for name in (parent, parent.removeprefix(prefix), prefix + parent):
        try:
            part = model.get_submodule(name)
        except AttributeError:
            continue
        if (
            name
            and next(part.children(), None) is None
            and next(part.parameters(), None) is not None
        ):
            return True
    return False
