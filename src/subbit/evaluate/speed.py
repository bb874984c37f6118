"""How fast a model runs on the CPU: prompts, greedy decoding, single linears, plain reading."""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subbit.packed.kernels import native
from subbit.packed.linear import packed_modules

__all__ = [
    "FIRST",
    "Rate",
    "decoding",
    "greedy",
    "linear_times",
    "prompts",
    "read_bandwidth",
    "read_bytes",
    "resident_bytes",
    "token_bytes",
]

FIRST = 16  # tokens of the prompt that decoding starts from


@dataclass(frozen=True)
class Rate:
    """Tokens a second over some repetitions.

    Attributes:
        mean: mean of the repetitions.
        sd: their standard deviation; 0 for a single one.
        best: the fastest of them.
    """

    mean: float
    sd: float
    best: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> "Rate":
        """From the time of each repetition of as many tokens."""
        rates = [tokens / took for took in seconds]
        mean = math.fsum(rates) / len(rates)
        spread = sum((rate - mean) ** 2 for rate in rates) / max(1, len(rates) - 1)
        return cls(mean, math.sqrt(spread), max(rates))


@torch.inference_mode()
def prompts(model: PreTrainedModel, count: int, repeats: int, seed: int = 0) -> Rate:
    """Time the forward pass of a prompt of `count` random tokens, up to its last logits."""
    tokens = _random_tokens(model, count, seed)
    _logits(model, tokens[:, :2])  # first calls are slower
    return Rate.of(count, [_timed(lambda: _logits(model, tokens)) for _ in range(repeats)])


@torch.inference_mode()
def decoding(model: PreTrainedModel, count: int, repeats: int, seed: int = 0) -> Rate:
    """Time `count` tokens of greedy decoding, one at a time, after a prompt of 16 tokens."""
    tokens = _random_tokens(model, FIRST, seed)
    seconds = []
    for _ in range(repeats):
        steps = _greedy_steps(model, tokens)
        next(steps)  # the prompt
        seconds.append(_timed(lambda steps=steps: [next(steps) for _ in range(count)]))
    return Rate.of(count, seconds)


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokens: Tensor, count: int) -> list[int]:
    """The `count` likeliest tokens after `tokens` `(1, length)`, the end token like any other."""
    steps = _greedy_steps(model, tokens)
    return [next(steps) for _ in range(count)]


@torch.inference_mode()
def linear_times(
    model: nn.Module, names: Mapping[tuple[int, int], Sequence[str]], rounds: int = 10
) -> dict[tuple[int, int], float]:
    """Time the linears of each shape with one vector.

    A round calls all linears once, in the order of the model, as decoding a token does: in a model
    larger than the caches their weights come from memory, in a smaller one from the caches, as
    there. The best round of each shape counts: other load only ever adds.

    Args:
        model: holds the linears, packed or dense, in one dtype.
        names: shape (outputs, inputs) -> dotted names.
        rounds: over all linears.

    Returns:
        Shape -> milliseconds a linear.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    shapes = {name: shape for shape, group in names.items() for name in group}
    rng = torch.Generator().manual_seed(0)
    inputs = {shape: torch.randn(1, 1, shape[1], generator=rng).to(dtype) for shape in names}
    linears = [
        (shapes[name], module, inputs[shapes[name]])
        for name, module in model.named_modules()
        if name in shapes
    ]
    best = dict.fromkeys(names, math.inf)
    for _ in range(rounds):
        round_of = dict.fromkeys(names, 0.0)
        for shape, module, x in linears:
            round_of[shape] += _timed(lambda module=module, x=x: module(x))
        best = {shape: min(best[shape], took) for shape, took in round_of.items()}
    return {shape: 1e3 * took / len(names[shape]) for shape, took in best.items()}


def read_bandwidth(nbytes: int = 256 << 20, rounds: int = 8) -> float | None:
    """Bytes a second of a loop that only reads memory, with torch's number of threads.

    Returns:
        The best of `rounds`, or None without compiled kernels.
    """
    data = torch.ones(nbytes // 8, dtype=torch.int64)
    if not native.available():
        return None
    return nbytes / min(_timed(lambda: native.read(data)) for _ in range(rounds))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and kept dense weights, shared ones once."""
    kept = [m.kept for m in packed_modules(model).values() if m.kept is not None]
    return _bytes([*model.parameters(), *model.buffers(), *kept])


def read_bytes(model: nn.Module) -> int:
    """As `resident_bytes`, without the codes of linears whose dense weight is kept."""
    unread = [m for m in packed_modules(model).values() if m.kept is not None]
    return resident_bytes(model) - sum(_bytes(m.fields().values()) for m in unread)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes that decoding one token has to read: `read_bytes` but other rows of the embedding.

    Activations and the key-value cache are not counted.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding
    unread = 0 if tied else embedding[1:].numel() * embedding.element_size()
    return read_bytes(model) - unread


def _bytes(tensors: Iterable[Tensor]) -> int:
    held = {tensor.data_ptr(): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _random_tokens(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, count), generator=rng)


def _logits(model: PreTrainedModel, tokens: Tensor, cache: Any = None) -> Any:
    """One forward pass; logits of the last position only, where the model can do that."""
    last = "logits_to_keep" in inspect.signature(model.forward).parameters
    only = {"logits_to_keep": 1} if last else {}
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, **only)


def _greedy_steps(model: PreTrainedModel, tokens: Tensor) -> Iterator[int]:
    cache = None
    while True:
        output = _logits(model, tokens, cache)
        cache = output.past_key_values
        tokens = output.logits[:, -1:].argmax(-1)
        yield tokens.item()
