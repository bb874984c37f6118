"""`subbit bench`: a packed model beside the original or its own dense weights, in one run."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import ModelError, RecipeError
from subbit.evaluate import speed
from subbit.hub.inspect import read_config
from subbit.hub.load import load, load_tokenizer
from subbit.model import weight_of
from subbit.model.load import load_model
from subbit.packed.kernels import kernel_name, processor
from subbit.packed.linear import packed_modules

__all__ = ["PROMPTS", "bench", "same_tokens"]

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "To make bread, first",
    "The sum of two and three is",
    "A cat sat on the",
    "My favourite season is",
    "The largest planet in the solar system",
    "Once upon a time there was",
    "In the year 1969,",
    "Computers work by",
    "The opposite of cold is",
    "She opened the door and",
    "A good breakfast consists of",
    "Plants need light because",
    "The train to the city leaves",
    "def add(a, b):",
    "Dear Sir or Madam,",
    "The recipe calls for two eggs and",
    "If it rains tomorrow, we",
    "Music is",
)
"""Twenty beginnings that greedy decoding goes on from, to compare two models token by token."""

_DTYPES = ("float32", "bfloat16")
_Say = Callable[[str], object]


def bench(
    folder: str | Path,
    original: str | None = None,
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    say: _Say = lambda text: None,
) -> dict[str, Any]:
    """Measure a packed folder on the CPU, and beside it dense models in float32 and bfloat16.

    One model is in memory at a time; all are measured in this run.

    What no kernel multiplies keeps its dense weight, as in `subbit generate`.

    Args:
        folder: the packed folder.
        original: the model it was made from; None = its own weights, decoded to a dense model.
        prompt: tokens of the prompt that is timed; fewer if the context is shorter.
        new_tokens: tokens of greedy decoding that are timed; likewise.
        repeats: of both.
        threads: of torch and the kernels; None = as torch has it.
        say: told what is measured next.

    Returns:
        Plain JSON: "processor", "threads", "kernel", "read_bandwidth" (bytes a second or None),
        "models" (one dict each: "model", "dtype", "backend", "bytes" held at last, "parameters",
        "token_bytes", "prompt" and "decode" with "tokens", "mean", "sd", "best" in tokens a second,
        "bandwidth" = token_bytes x best), "linears" (one dict a shape: "shape", "count", "bytes"
        that a product of the packed float32 model reads, "ms" by "model dtype"), and "tokens":
        "prompts", "same", "new_tokens" and "gap" of the comparison with the dense float32 weights
        (`same_tokens`).

    Raises:
        RecipeError: numbers that mean nothing.
        ModelError: `original` has not the linears that the packed folder has.
        ModelError, FormatError: as `load` and `load_model` do.
    """
    if min(prompt, new_tokens, repeats, threads or 1) < 1:
        raise RecipeError("tokens, repeats and threads of a benchmark must be at least 1")
    names = _names_by_shape(folder)
    found = {"processor": processor(), "kernel": kernel_name(), "models": []}
    with _threads(threads) as found["threads"]:
        found["read_bandwidth"] = speed.read_bandwidth()
        linears: dict[str, dict[tuple[int, int], float]] = {}
        packed_bytes: dict[tuple[int, int], int] = {}
        for kind, dtype, make in _contenders(folder, original):
            say(f"{kind} {dtype}")
            model = make()
            if kind == "original":
                _check_same_linears(original, model, names)
            found["models"].append(
                {"model": kind, "dtype": dtype, "backend": _backend(model)}
                | _rates(model, prompt, new_tokens, repeats)
            )
            linears[f"{kind} {dtype}"] = speed.linear_times(model, names)
            if (kind, dtype) == ("packed", _DTYPES[0]):
                packed_bytes = {
                    shape: speed.read_bytes(model.get_submodule(group[0]))
                    for shape, group in names.items()
                }
            del model  # before the next one is made
            gc.collect()
        found["models"].sort(key=lambda model: model["model"] != "packed")
        order = [f"{model['model']} {model['dtype']}" for model in found["models"]]
        found["linears"] = [
            {
                "shape": list(shape),
                "count": len(group),
                "bytes": packed_bytes[shape],
                "ms": {name: linears[name][shape] for name in order},
            }
            for shape, group in names.items()
        ]
        say("greedy tokens")
        found["tokens"] = _compared(folder)
    return found


@torch.inference_mode()
def same_tokens(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int = 24,
) -> tuple[int, float]:
    """Compare the greedy tokens that both models say after each of `PROMPTS`.

    Returns:
        After how many prompts all `new_tokens` are the same; and, where they first differ, how far
        apart at most the reference's logits of the two tokens are: next to 0 means a tie that
        rounding decided. 0 where nothing differs.
    """
    same, widest = 0, 0.0
    for text in PROMPTS:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        said, wanted = (speed.greedy(m, tokens, new_tokens) for m in (model, reference))
        same += said == wanted
        for i, (ours, theirs) in enumerate(zip(said, wanted, strict=True)):
            if ours != theirs:
                so_far = torch.cat([tokens, torch.tensor([said[:i]], dtype=torch.int64)], 1)
                logits = reference(input_ids=so_far).logits[0, -1].float()
                widest = max(widest, (logits[theirs] - logits[ours]).item())
                break
    return same, widest


def _names_by_shape(folder: str | Path) -> dict[tuple[int, int], list[str]]:
    names: dict[tuple[int, int], list[str]] = {}
    for name, (layout, _) in read_config(folder).layouts().items():
        names.setdefault((layout.rows, layout.cols), []).append(name)
    return names


def _contenders(
    folder: str | Path, original: str | None
) -> Iterator[tuple[str, str, Callable[[], PreTrainedModel]]]:
    """Kind, dtype and maker of each contender; an original first, since it may be a wrong one."""
    for dtype in _DTYPES:
        if original is None:
            yield "decoded", dtype, partial(_decoded, folder, dtype)
        else:
            yield "original", dtype, lambda dtype=dtype: load_model(original, dtype=dtype).model
    for dtype in _DTYPES:
        yield "packed", dtype, partial(load, folder, dtype=dtype, device="cpu", keep_dense=True)


def _check_same_linears(
    source: str, model: PreTrainedModel, names: dict[tuple[int, int], list[str]]
) -> None:
    """Refuse an original that the packed folder was not made from, before anything is timed."""
    for shape, group in names.items():
        for name in group:
            try:
                found = tuple(weight_of(model.get_submodule(name)).shape)
            except AttributeError:
                found = None
            if found != shape:
                raise ModelError(
                    f"'{source}' is not the original of the packed model: its {name} is "
                    f"{'not there' if found is None else found}, and should be {shape}."
                )


def _decoded(folder: str | Path, dtype: str) -> PreTrainedModel:
    """The packed weights as an ordinary model, by the reference decode."""
    model = load(folder, dtype=dtype, device="cpu", backend="reference")
    return model.dequantize(getattr(torch, dtype))


def _backend(model: nn.Module) -> str:
    kinds = {module.backend for module in packed_modules(model).values()}
    if not kinds:
        return "torch"
    names = {"cpu": kernel_name(), "reference": "torch, dense weights kept"}
    return " + ".join(sorted(names[kind] for kind in kinds))


def _rates(model: PreTrainedModel, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context:
        prompt, new_tokens = min(prompt, context), min(new_tokens, max(1, context - speed.FIRST))
    decode = speed.decoding(model, new_tokens, repeats)
    nbytes = speed.token_bytes(model)
    return {
        "bytes": speed.resident_bytes(model),
        "parameters": _parameters(model),
        "token_bytes": nbytes,
        "prompt": {"tokens": prompt} | vars(speed.prompts(model, prompt, repeats)),
        "decode": {"tokens": new_tokens} | vars(decode),
        "bandwidth": nbytes * decode.best,
    }


def _parameters(model: nn.Module) -> int:
    """Parameters of the model, packed linears counted as what they stand for."""
    packed = packed_modules(model).values()
    inside = {id(p) for m in packed for name, p in m.named_parameters() if name != "bias"}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return dense + sum(m.in_features * m.out_features for m in packed)


def _compared(folder: str | Path, new_tokens: int = 24) -> dict[str, Any]:
    reference = _decoded(folder, "float32")
    model = load(folder, dtype="float32", device="cpu")
    same, gap = same_tokens(model, reference, load_tokenizer(folder), new_tokens)
    return {"prompts": len(PROMPTS), "same": same, "new_tokens": new_tokens, "gap": gap}


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Set torch's number of threads, yield it, and put back what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
