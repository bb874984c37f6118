"""Text -> windows of tokens, with a record of exactly which tokens they are."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subbit.errors import CalibrationError, RecipeError, nearest
from subbit.text.sources import Text

__all__ = [
    "BOS_POLICIES",
    "SAMPLING",
    "Windows",
    "begins_with_bos",
    "check_windows",
    "fingerprint",
    "make_windows",
    "tokenizer_name",
]

BOS_POLICIES = ("none", "document", "window")
SAMPLING = ("first", "random")

_MOST_CHARACTERS = 200_000_000
_BYTES_A_CHARACTER = 140  # that a tokenizer takes, measured


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens and where they come from.

    Attributes:
        tokens: int64 `(nsamples, seqlen)`.
        source, role, origin, joiner: as in `Text`.
        tokenizer: name of the tokenizer.
        bos: where BOS tokens were put: "none", "document", "window".
        sample: how windows were taken: "first", "random", or "model" for text sampled from it.
        seed: seed of the generator of a random choice; None when nothing was random.
        skip_tokens: tokens left out at the start of the text.
        tokens_available: tokens of the whole text, the skipped ones included.
        sampling: temperature and top_k of text sampled from the model; else empty.
    """

    tokens: Tensor
    source: str
    role: str
    origin: str
    joiner: str
    tokenizer: str
    bos: str
    sample: str
    seed: int | None
    skip_tokens: int
    tokens_available: int
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def nsamples(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens a window."""
        return self.tokens.shape[1]

    @property
    def fingerprint(self) -> str:
        """`fingerprint(self.tokens)`."""
        return fingerprint(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the provenance, JSON-able: everything but the tokens, and their fingerprint."""
        return {
            "source": self.source,
            "role": self.role,
            "origin": self.origin,
            "joiner": self.joiner,
            "tokenizer": self.tokenizer,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "bos": self.bos,
            "sample": self.sample,
            "seed": self.seed,
            "skip_tokens": self.skip_tokens,
            "tokens_available": self.tokens_available,
            "fingerprint": self.fingerprint,
            **self.sampling,
        }


def fingerprint(tokens: Tensor) -> str:
    """Return the SHA-256 (hex) of the tokens and then the shape, all as int64 little-endian."""
    digest = hashlib.sha256()
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    digest.update(torch.tensor(tokens.shape).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def make_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int | None,
    seqlen: int,
    bos: str = "none",
    sample: str = "first",
    seed: int = 0,
    skip_tokens: int = 0,
) -> Windows:
    """Tokenise `text` once, without the tokenizer's special tokens, and cut it into windows.

    Args:
        text: from `load_text`.
        tokenizer: of the model.
        nsamples: number of windows; None = as many as the text fills.
        seqlen: tokens a window.
        bos: "none"; "document" = a BOS before every document (each is tokenised by itself, with
            the joiner after it); "window" = BOS in position 0 and seqlen - 1 tokens of text.
        sample: "first" = non-overlapping windows in order; "random" = windows at offsets drawn
            uniformly, which may overlap, from an own generator.
        seed: seed of that generator.
        skip_tokens: tokens to leave out at the start.

    Raises:
        RecipeError: an option that means nothing, or a BOS that the tokenizer has not.
        CalibrationError: too little text, or more than can be tokenised at once; the message has
            the counts.
    """
    _check_options(tokenizer, nsamples, seqlen, bos, sample, skip_tokens)
    _check_size(text)
    if bos == "document" and text.name == "wikitext2":
        raise RecipeError(
            "wikitext2 is one text whose rows are lines, not documents; use bos 'window' or 'none'"
        )
    if bos == "document":
        stream = _tokenize_documents(text, tokenizer)
    else:
        stream = torch.tensor(_tokenize([text.joined], tokenizer)[0], dtype=torch.long)
    length = seqlen - 1 if bos == "window" else seqlen  # tokens of text in a window
    usable = stream[skip_tokens:]
    nsamples = _fitting(text, nsamples, seqlen, length, usable.numel(), skip_tokens)
    if sample == "first":
        tokens = usable[: nsamples * length].view(nsamples, length)
    else:
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(usable.numel() - length + 1, (nsamples,), generator=generator)
        tokens = torch.stack([usable[i : i + length] for i in offsets.tolist()])
    if bos == "window":
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=tokenizer.bos_token_id)
    return Windows(
        tokens=tokens.contiguous(),
        source=text.name,
        role=text.role,
        origin=text.origin,
        joiner=text.joiner,
        tokenizer=tokenizer_name(tokenizer),
        bos=bos,
        sample=sample,
        seed=seed if sample == "random" else None,
        skip_tokens=skip_tokens,
        tokens_available=stream.numel(),
    )


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hub id of `tokenizer`, or its folder's name without the path, or its class."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return Path(name).name if Path(name).exists() else name


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts a BOS before a text, as its model may rely on."""
    return tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]


def check_windows(windows: Windows, config: PretrainedConfig) -> None:
    """Refuse windows that a model of this `config` cannot take.

    Raises:
        RecipeError: windows longer than the model's context, or token ids outside its vocabulary.
    """
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and windows.seqlen > context:
        raise RecipeError(
            f"seqlen {windows.seqlen} is more than the {context} positions of this "
            f"{config.model_type} model; use a seqlen of at most {context}"
        )
    largest = int(windows.tokens.max())
    if largest >= config.vocab_size:
        raise RecipeError(
            f"the tokenizer '{windows.tokenizer}' gives token {largest} but the model's vocabulary "
            f"has {config.vocab_size}; use the tokenizer that belongs to the model"
        )


def _check_options(
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int | None,
    seqlen: int,
    bos: str,
    sample: str,
    skip_tokens: int,
) -> None:
    if nsamples is not None and nsamples < 1:
        raise RecipeError(f"nsamples is {nsamples}; it must be at least 1")
    if seqlen < 2:
        raise RecipeError(f"seqlen is {seqlen}; a window needs at least 2 tokens")
    if skip_tokens < 0:
        raise RecipeError(f"skip_tokens is {skip_tokens}; it must not be negative")
    if bos not in BOS_POLICIES:
        raise RecipeError(f"no BOS policy '{bos}'{nearest(bos, BOS_POLICIES)}")
    if sample not in SAMPLING:
        raise RecipeError(f"no window sampling '{sample}'{nearest(sample, SAMPLING)}")
    if bos != "none" and tokenizer.bos_token_id is None:
        raise RecipeError(f"bos is '{bos}' but the tokenizer has no BOS token; use bos 'none'")


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: a whole corpus is longer than any model's context, which is no mistake here
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _tokenize_documents(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    pieces = [document + text.joiner for document in text.documents[:-1]] + text.documents[-1:]
    stream: list[int] = []
    for document, ids in zip(text.documents, _tokenize(pieces, tokenizer)):
        if document.strip():  # blank lines are no documents
            stream.append(tokenizer.bos_token_id)
        stream.extend(ids)
    return torch.tensor(stream, dtype=torch.long)


def _check_size(text: Text) -> None:
    size = sum(map(len, text.documents))
    if size > _MOST_CHARACTERS:
        raise CalibrationError(
            f"'{text.name}' has {size:,} characters and is tokenised as a whole, which would take "
            f"some {size * _BYTES_A_CHARACTER >> 30} GiB of memory; give at most "
            f"{_MOST_CHARACTERS:,} characters of it (128 windows of 2048 tokens take 1,000,000)"
        )


def _fitting(
    text: Text, nsamples: int | None, seqlen: int, length: int, usable: int, skip_tokens: int
) -> int:
    """Return the number of windows to take, or refuse when the text is too short.

    Args:
        seqlen: tokens of a window.
        length: those of them that are text.
        usable: tokens of text.
    """
    most = usable // length
    wanted = most if nsamples is None else nsamples
    if 1 <= wanted <= most:
        return wanted
    after = f" after the first {skip_tokens}" if skip_tokens else ""
    longest = usable + seqlen - length
    remedy = f"use at most {most} windows or " if most else ""
    if not most and longest > 1:
        remedy = f"use a seqlen of at most {longest} or "
    needed = max(wanted, 1) * length
    raise CalibrationError(
        f"'{text.name}' ({text.role}) has {usable} tokens{after} but {max(wanted, 1)} windows of "
        f"{length} need {needed}; {remedy}give more text"
    )
