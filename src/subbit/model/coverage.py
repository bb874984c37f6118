"""Nothing is skipped in silence: every weight is compressed, an embedding, or named by the user."""

import fnmatch
import json
import re

from torch import nn

from subbit.errors import ModelError, nearest
from subbit.model.blocks import Blocks, find_linears

__all__ = ["check_coverage", "is_skipped"]

_SHOWN = 4


def is_skipped(name: str, skip: list[str]) -> bool:
    """Say whether a module or parameter of this dotted name is to be left as it is.

    A pattern is a shell glob (`*.mlp.gate`) or a regular expression; it must match the whole of
    the name, or the whole name of a module that holds it: `vision_tower` skips all below it.
    """
    return any(_matches(name, pattern) for pattern in skip)


def check_coverage(
    model: nn.Module, blocks: Blocks, skip: list[str] | None = None
) -> list[tuple[str, int]]:
    """Check that every weight of the model is compressed or kept for a known reason.

    Args:
        model: the causal LM.
        blocks: its decoder blocks.
        skip: patterns (see `is_skipped`) of what the user agrees to keep as it is.

    Returns:
        `(name, parameter count)` of the parameters of two and more dimensions that are kept as
        they are: embeddings, the output head, and whatever `skip` names.

    Raises:
        ModelError: some weight is neither a linear of a block nor an embedding nor skipped; a
            pattern matches nothing; or nothing is left to compress.
    """
    skip = skip or []
    embeddings = _embedding_ids(model)
    linears = {
        id(linear.weight)
        for i, block in enumerate(blocks.modules)
        for name, linear in find_linears(block).items()
        if not is_skipped(f"{blocks.name(i)}.{name}", skip)
    }
    _check_patterns(model, skip)

    kept: list[tuple[str, int]] = []
    missed: dict[str, nn.Parameter] = {}
    compressed = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if id(parameter) in embeddings or is_skipped(name, skip):
            kept.append((name, parameter.numel()))
        elif id(parameter) in linears:
            compressed += 1
        else:
            missed[name] = parameter
    if missed:
        raise ModelError(_missed_message(model, missed))
    if not compressed:
        raise ModelError(
            f"nothing of {type(model).__name__} is left to compress: the skip patterns "
            f"{json.dumps(skip)} match every linear of {blocks.path}"
        )
    return kept


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes):
        return True
    try:
        regex = re.compile(pattern)
    except re.error:
        return False
    return any(regex.fullmatch(prefix) for prefix in prefixes)


def _check_patterns(model: nn.Module, skip: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in skip:
        if not any(_matches(name, pattern) for name in names):
            raise ModelError(
                f"the skip pattern '{pattern}' matches no parameter of {type(model).__name__}"
                + nearest(pattern, {_general(name.rpartition(".")[0]) for name in names})
            )


def _embedding_ids(model: nn.Module) -> set[int]:
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if module is not None:
            modules.append(module)
    return {id(module.weight) for module in modules if hasattr(module, "weight")}


def _general(name: str) -> str:
    """Return the name with block numbers replaced by `*`: one pattern for all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _missed_message(model: nn.Module, missed: dict[str, nn.Parameter]) -> str:
    count = sum(parameter.numel() for parameter in missed.values())
    share = count / sum(parameter.numel() for parameter in model.parameters())
    shown = [
        f"{name} ({'×'.join(str(size) for size in parameter.shape)})"
        for name, parameter in list(missed.items())[:_SHOWN]
    ]
    more = f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else ""
    patterns = sorted({_general(name) for name in missed})
    return (
        f"{len(missed)} weight tensors of {type(model).__name__}, {share:.1%} of its parameters, "
        "are not linears of its decoder blocks and would stay uncompressed: "
        f"{', '.join(shown)}{more}; to accept that, pass --set skip='{json.dumps(patterns)}'"
    )
