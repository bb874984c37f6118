"""The text on which all blocks are refitted together: calibration windows, or those and more.

With `refit.model_text: sampled` every other step takes a window that the original model wrote.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subbit.model import BlockCall, Blocks, LoadedModel, first_inputs, run_block
from subbit.model.capture import placed
from subbit.recipe import Recipe
from subbit.run.commits import Workdir
from subbit.text import continued_windows

__all__ = ["Lessons"]

Advance = Callable[[float], None]

_WRITING = 6  # writing a window takes about as long as running it through the model so many times


class Lessons:
    """Windows for `refit_model`, and what leaves the last block of the original model on them.

    Args:
        loaded: the model and its tokenizer.
        blocks: its decoder blocks.
        calls: their other arguments.
        tokens: the calibration windows, int64 `(nsamples, seqlen)`.
        recipe: `refit.model_steps`, `refit.model_text` and the seed of its calibration.
        device: where the blocks are run and the model writes.

    Attributes:
        count: windows to be written; 0 where calibration windows are all that is used.
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
        self.seed, self.spec = recipe.calibration.seed, recipe.refit
        self.count = self.spec.model_steps // 2 if self.spec.model_text == "sampled" else 0
        self._written = tokens[:0]
        self._target: Tensor | None = None

    @property
    def steps(self) -> int:
        """What `prepare` advances in all: windows run through a block, or as much work."""
        return (_WRITING + 1) * len(self.blocks.modules) * self.count

    def prepare(self, workdir: Workdir | None, advance: Advance) -> None:
        """Write the windows, or take up those of an interrupted run, and run the model on them.

        Only where there are windows to be written (`count`), and while the model is the original.

        Args:
            workdir: keeps what was written.
            advance: called with steps.
        """
        self._written = self._write(workdir, advance)
        hidden = first_inputs(self.model, self.blocks, self._written)
        for block, call in zip(self.blocks.modules, self.calls, strict=True):
            run_block(block, hidden, call, out=hidden, device=self.device, advance=advance)
        self._target = hidden

    def target(self, originals: Tensor) -> Tensor:
        """Hidden states that are to leave the last block, `(nsamples + count, seqlen, width)`.

        To be asked for once: those of the written windows are handed over.

        Args:
            originals: those of the original model on the calibration windows.
        """
        written, self._target = self._target, None
        return originals if written is None else torch.cat((originals, written))

    def inputs(self) -> Tensor:
        """Hidden states that enter the first block, of the same windows."""
        tokens = torch.cat((self.tokens, self._written))
        return first_inputs(self.model, self.blocks, tokens)

    def order(self) -> list[int]:
        """The window of every step of `refit_model`.

        Calibration windows in turn; where windows were written, they take every other step.
        """
        given, steps = len(self.tokens), range(self.spec.model_steps)
        if not self.count:
            return [step % given for step in steps]
        return [given + step // 2 if step % 2 else step // 2 % given for step in steps]

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
