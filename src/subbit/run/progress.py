"""One progress bar for a whole job; plain lines where nobody watches a terminal."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from subbit.run.memory import format_bytes, peak_cuda_bytes, peak_rss_bytes

__all__ = ["Progress"]


class _PeakMemory(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(_peak(), style="magenta")


def _peak() -> str:
    cuda = peak_cuda_bytes()
    gpu = f" + {format_bytes(cuda)} GPU" if cuda else ""
    return f"peak {format_bytes(peak_rss_bytes())}{gpu}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Progress:
    """Context manager: one bar for the whole job, on stderr.

    On a terminal: description, bar, percent, elapsed, time left, peak memory. Elsewhere: one plain
    line per phase and per finished block (per tenth of the job where there are no blocks).

    Args:
        total_steps: steps of the whole job, in any unit; see `advance`.
        enabled: False shows nothing at all (library use).
        file: where to write instead of stderr.
    """

    def __init__(
        self, total_steps: float, enabled: bool = True, file: TextIO | None = None
    ) -> None:
        self.total = max(float(total_steps), 1e-9)
        self.done = 0.0
        self._skipped = 0.0
        self._phase = ""
        self._block: tuple[int, int | None] | None = None
        self._linear = ""
        self._losses: list[float] = []
        self._tenth = 0
        self._started = time.monotonic()
        self._enabled = enabled
        self._console = Console(file=file or sys.stderr, soft_wrap=True, highlight=False)
        self._bar: RichProgress | None = None
        if enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                _PeakMemory(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=self.total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self._end_block()
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str) -> None:
        """Say that another part of the job begins, such as `coarse stage`."""
        self._end_block()
        self._phase, self._block, self._linear = name, None, ""
        self._show(plain=name)

    def update(
        self,
        block: int | None = None,
        nblocks: int | None = None,
        linear: str | None = None,
        loss: float | None = None,
    ) -> None:
        """Say what is being worked on. What is left out stays as it was.

        Args:
            block: the block at work, counted from 1; a new one ends the one before.
            nblocks: number of blocks.
            linear: name of the linear at work, inside its block.
            loss: loss of the linear that was just finished.
        """
        if block is not None and (self._block is None or block != self._block[0]):
            self._end_block()
            self._block, self._linear, self._losses = (block, nblocks), "", []
        if linear is not None:
            self._linear = linear
        if loss is not None:
            self._losses.append(loss)
        self._show()

    def resize(self, total_steps: float) -> None:
        """Say that the job has `total_steps` after all."""
        self.total = max(float(total_steps), 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, total=self.total)

    def advance(self, steps: float = 1) -> None:
        """Say that `steps` of the job's `total_steps` are done."""
        self.done = min(self.done + steps, self.total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        tenth = int(10 * self.done / self.total)
        if self._bar is None and self._block is None and tenth > self._tenth:
            self._plain(self._phase)
        self._tenth = tenth

    def skip(self, steps: float) -> None:
        """Say that an earlier run did `steps` of the job; they do not count for the time left."""
        self._skipped += steps
        self.advance(steps)

    def _end_block(self) -> None:
        if self._block is not None and self._bar is None:
            loss = sum(self._losses) / len(self._losses) if self._losses else None
            mean = "" if loss is None else f" · mean loss {loss:.4g}"
            self._plain(f"{self._where()} done{mean}")
        self._block = None

    def _where(self) -> str:
        if self._block is None:
            return self._phase
        block, nblocks = self._block
        return f"block {block}" if nblocks is None else f"block {block}/{nblocks}"

    def _show(self, plain: str = "") -> None:
        if self._bar is None:
            if plain and self._enabled:
                self._console.print(Text(plain))
            return
        parts = [self._where(), self._linear]
        if self._losses:
            parts.append(f"loss {self._losses[-1]:.3g}")
        self._bar.update(self._task, description=" · ".join(part for part in parts if part))

    def _plain(self, text: str) -> None:
        if not self._enabled:
            return
        elapsed = time.monotonic() - self._started
        worked, ahead = self.done - self._skipped, self.total - self.done
        left = f" · left {_clock(elapsed * ahead / worked)}" if worked > 0 else ""
        parts = (
            f"{text} · {self.done / self.total:.0%} · elapsed {_clock(elapsed)}{left} · {_peak()}"
        )
        self._console.print(Text(parts))
