"""Calibration and evaluation text: a source, its documents, and windows of their tokens."""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subbit.errors import RecipeError
from subbit.text.sample import Shelf, continued_windows, sample_windows
from subbit.text.sources import NAMED_SOURCES, SELF, Text, load_text
from subbit.text.windows import Windows, check_windows, make_windows

__all__ = [
    "NAMED_SOURCES",
    "SELF",
    "Text",
    "Windows",
    "calibration_windows",
    "check_windows",
    "continued_windows",
    "load_text",
    "make_windows",
    "sample_windows",
]


def calibration_windows(
    source: str | Text,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    bos: str = "none",
    sample: str = "first",
    seed: int = 0,
    skip_tokens: int = 0,
    shelf: Shelf | None = None,
    advance: Callable[[int], None] | None = None,
) -> Windows:
    """Return the calibration windows of `source`; `self` samples them from `model`.

    Args:
        source: as in `load_text`, or what it returned, or `self`.
        tokenizer: of the model.
        model: needed for `self`; when given, the windows are checked against its context and
            vocabulary.
        nsamples, seqlen, bos, sample, seed, skip_tokens: as in `make_windows`. `self` takes
            neither `sample` nor `skip_tokens`, and starts every window with BOS if there is one.
        shelf: keeps what was sampled, for a call after an interrupted one (`self` only).
        advance: called with the number of tokens sampled so far unreported (`self` only).

    Raises:
        RecipeError, CalibrationError, NonFiniteError: as `load_text`, `make_windows`,
            `sample_windows`.
    """
    if source != SELF:
        text = source if isinstance(source, Text) else load_text(source, "calibration")
        windows = make_windows(
            text,
            tokenizer,
            nsamples=nsamples,
            seqlen=seqlen,
            bos=bos,
            sample=sample,
            seed=seed,
            skip_tokens=skip_tokens,
        )
        if model is not None:
            check_windows(windows, model.config)
        return windows
    if model is None:
        raise RecipeError("the source 'self' is sampled from the model; give the model too")
    if sample != "first" or skip_tokens or bos == "document":
        raise RecipeError(
            "the source 'self' has no documents and no text to choose from; leave 'sample', "
            "'skip_tokens' and 'bos' at their defaults"
        )
    return sample_windows(
        model, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed, shelf=shelf, advance=advance
    )
