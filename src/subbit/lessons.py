"""The text on which all blocks are refitted together: calibration windows, or those and more.

With `refit.model_text: sampled` every other step takes text that the original model wrote; with
`refit.model_seqlen` all of it is cut into pieces, and a step takes one of these.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subbit.model import BlockCall, Blocks, LoadedModel, first_inputs, record_calls, run_block
from subbit.model.capture import placed
from subbit.recipe import Recipe
from subbit.run.commits import Workdir
from subbit.text import continued_windows

__all__ = ["Lessons"]

Advance = Callable[[float], None]

_WRITING = 6  # writing a window takes about as long as running it through the model so many times


class Lessons:
    """Texts for `refit_model`, and what leaves the last block of the original model on them.

    Args:
        loaded: the model and its tokenizer.
        blocks: its decoder blocks.
        calls: their other arguments where windows are whole.
        tokens: the calibration windows, int64 `(nsamples, seqlen)`.
        recipe: its `refit`, and the seed of its calibration.
        device: where the blocks are run and the model writes.

    Attributes:
        pieces: how many a window is cut into; 1 = none is cut.
        count: windows to be written; 0 where calibration windows are all that is used.
        calls: the other arguments of the blocks for a piece, once there is something prepared.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: Blocks,
        calls: list[BlockCall],
        tokens: Tensor,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.blocks = loaded.model, loaded.tokenizer, blocks
        self.calls, self.tokens, self.device = calls, tokens, device
        self.seed, self.bos = recipe.calibration.seed, recipe.calibration.bos
        self.spec = recipe.refit
        self.pieces = self.spec.pieces(tokens.shape[1])
        self._length = tokens.shape[1] if self.pieces == 1 else self.spec.model_seqlen
        self._given = len(tokens) * self.pieces  # texts out of the calibration windows
        written = self.spec.model_steps // 2 if self.spec.model_text == "sampled" else 0
        self.count = -(-written // self.pieces)
        self._written = tokens[:0]
        self._target: Tensor | None = None

    @property
    def steps(self) -> int:
        """What `prepare` advances in all: windows run through a block, or as much work."""
        run = self.count + (len(self.tokens) if self.pieces > 1 else 0)
        return (_WRITING * self.count + run) * len(self.blocks.modules)

    def prepare(self, workdir: Workdir | None, advance: Advance) -> None:
        """Write the windows, or take up those of an interrupted run, and run the model on them.

        Only where there is something to do (`steps`), and while the model is the original.

        Args:
            workdir: keeps what was written.
            advance: called with steps.
        """
        if self.count:
            self._written = self._write(workdir, advance)
        tokens = self._written  # whole calibration windows are run by the calibrator
        if self.pieces > 1:
            tokens = self._texts()
            self.calls = record_calls(self.model, self.blocks, tokens)

        def piece(run: int) -> None:
            advance(run / self.pieces)

        hidden = first_inputs(self.model, self.blocks, tokens)
        for block, call in zip(self.blocks.modules, self.calls, strict=True):
            run_block(block, hidden, call, out=hidden, device=self.device, advance=piece)
        self._target = hidden

    def target(self, originals: Tensor) -> Tensor:
        """Hidden states that are to leave the last block, `(texts, tokens of each, width)`.

        To be asked for once: those that `prepare` found are handed over.

        Args:
            originals: those of the original model on the whole calibration windows.
        """
        found, self._target = self._target, None
        if found is None:
            return originals
        return found if self.pieces > 1 else torch.cat((originals, found))

    def inputs(self) -> Tensor:
        """Hidden states that enter the first block, of the same texts."""
        return first_inputs(self.model, self.blocks, self._texts())

    def order(self) -> list[int]:
        """The text of every step of `refit_model`.

        Those of the calibration windows in turn; where windows were written, they take every other
        step.
        """
        given, steps = self._given, range(self.spec.model_steps)
        if not self.count:
            return [step % given for step in steps]
        return [given + step // 2 if step % 2 else step // 2 % given for step in steps]

    def _texts(self) -> Tensor:
        """All windows, or the pieces that they are cut into; the rest of a window is left out."""
        windows = torch.cat((self.tokens, self._written))
        texts = windows[:, : self.pieces * self._length].reshape(-1, self._length)
        if self.bos == "window":
            texts[: self._given, 0] = self.tokens[0, 0]
        return texts

    def _write(self, workdir: Workdir | None, advance: Advance) -> Tensor:
        seqlen, left = self.tokens.shape[1], float(_WRITING * len(self.blocks.modules) * self.count)
        share = left / (self.count * seqlen)

        def count(tokens: int) -> None:
            nonlocal left
            left -= tokens * share
            advance(tokens * share)

        with placed(self.model, self.device):
            written = continued_windows(
                self.model,
                self.tokenizer,
                self.tokens,
                nsamples=self.count,
                seed=self.seed,
                shelf=workdir,
                advance=count,
            )
        advance(left)  # what was given, not written
        return written
