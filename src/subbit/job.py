"""One run over the blocks of a model: capture, compress, refit, commit, and on to the next one.

Read `Job.run` from top to bottom; `compress` in `compression.py` is what prepares it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from subbit.calibration import Calibrator, Statistics
from subbit.coarse import CoarseStage, Kept
from subbit.committed import CommittedBlocks
from subbit.lessons import Lessons
from subbit.linalg import GramAccumulator, relative_loss
from subbit.methods import LinearStats, Method
from subbit.model import (
    Blocks,
    LoadedModel,
    OutputGrams,
    TokenGradients,
    find_linears,
    first_inputs,
    is_skipped,
    look_at_gradients,
    record_calls,
    replace_module,
    weight_of,
)
from subbit.packed.linear import PackedLinear, dense_cache
from subbit.recipe import Recipe
from subbit.refit import JUDGED, STEP, Refit, refit_block, refit_model
from subbit.result import CompressedModel, totals
from subbit.run.commits import Workdir
from subbit.run.log import LinearLog
from subbit.run.memory import peak_rss_bytes
from subbit.run.progress import Progress
from subbit.text import Windows

__all__ = ["Job"]


class Job:
    """One run over the blocks of a model.

    Args:
        loaded: the model, finite and covered; its linears are replaced in place.
        blocks: its decoder blocks.
        windows: the calibration windows.
        recipe: what to do.
        method: the method that the recipe names, made.
        device: where blocks are run and linears compressed.
        workdir: where finished blocks are committed and found again, or None.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: Blocks,
        windows: Windows,
        recipe: Recipe,
        method: Method,
        device: torch.device,
        workdir: Workdir | None,
    ) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.blocks, self.tokens = blocks, windows.tokens
        self.recipe, self.method, self.device, self.workdir = recipe, method, device, workdir
        self.result = CompressedModel(
            loaded.model, loaded.tokenizer, recipe, windows.to_dict(), base_model=loaded.source
        )
        self.linears = [
            {
                name: linear
                for name, linear in find_linears(block).items()
                if not is_skipped(f"{blocks.name(i)}.{name}", recipe.skip)
            }
            for i, block in enumerate(blocks.modules)
        ]
        self.names = [list(own) for own in self.linears]
        self.committed = CommittedBlocks(workdir, blocks, self.names, recipe.refit)
        self.outputs: list[dict[str, GramAccumulator]] = [{} for _ in self.linears]
        self.seconds: dict[str, float] = self._fetch_seconds()
        self.started = time.monotonic() - self.seconds.pop("total", 0.0)
        self.passes = 1
        self.coarse = 0  # steps of the coarse stage
        self.written = 0  # steps of having the model write

    @property
    def steps(self) -> int:
        """Steps of the whole job: one per window and pass, one per linear and ten windows."""
        count = len(self.blocks.modules)
        others = count * len(self.tokens) + self.coarse + self.written + self._steps_of_model
        others += self._steps_of_gradients * (self._by_token or self._by_output)
        return others + sum(map(self._steps_of_block, range(count)))

    @property
    def _steps_of_gradients(self) -> int:
        """Steps of running all windows there and back."""
        return 4 * len(self.blocks.modules) * len(self.tokens)

    @property
    def _steps_of_model(self) -> int:
        """Steps of refitting all blocks together."""
        spec, (nsamples, seqlen) = self.recipe.refit, self.tokens.shape
        pieces = spec.pieces(seqlen)
        judged = 2 * min(JUDGED, nsamples * pieces)
        runs = STEP * spec.model_steps + judged if spec.model_steps else 0
        return len(self.blocks.modules) * runs // pieces

    def _steps_of_block(self, i: int) -> int:
        """Steps of compressing one block, without propagation."""
        refit = self.recipe.refit.steps * _REFIT_STEPS
        linears = len(self.names[i]) * self._linear_steps
        return len(self.tokens) * self.passes + linears + refit

    @property
    def _linear_steps(self) -> int:
        return max(1, len(self.tokens) // 10)

    def run(self, bar: Progress) -> CompressedModel:
        """Coarse stage, then block by block: capture, compress, commit, propagate."""
        try:
            return self._run(bar)
        finally:
            self._store_seconds()

    def _run(self, bar: Progress) -> CompressedModel:
        bar.phase("two windows through the original model")
        calls = record_calls(self.model, self.blocks, self.tokens)
        hidden = first_inputs(self.model, self.blocks, self.tokens)
        lessons = self._lessons(calls, bar)
        gradients = self._gradients(calls, hidden, bar)
        calibrator = Calibrator(self.recipe, self.blocks, calls, hidden, self.device, gradients)
        self.passes = calibrator.passes(self.linears[0])
        bar.resize(self.steps)
        kept = self._coarse_stage(calls, hidden, bar)
        del hidden  # the calibrator's, which lets go of it before all blocks are refitted
        log = self._open_log()
        count = len(self.blocks.modules)
        whole = self.committed.is_compressed  # then nobody reads the hidden states it would have
        bar.phase("compressing")
        for i, block in enumerate(self.blocks.modules):
            bar.update(block=i + 1, nblocks=count)
            if i < self.committed.count:
                if not self.committed.is_done:
                    calibrator.propagate_original(i)
                self._restore(i)
                bar.skip(self._steps_of_block(i))
            else:
                self._compress_block(i, calibrator, None if kept is None else kept[i], bar, log)
            if whole:
                bar.skip(len(self.tokens))
            elif i + 1 < count:  # nobody looks at what the last one puts out
                with self._stage("propagate"), dense_cache(block):
                    calibrator.propagate(i, bar.advance)
        if self.recipe.refit.model_steps:
            self._refit_model(calibrator, lessons, bar)
        if log is not None:
            log.close()
        self._finish(kept)
        return self.result

    @property
    def _by_token(self) -> bool:
        return self.recipe.calibration.tokens == "gradient"

    @property
    def _by_output(self) -> bool:
        return self.recipe.calibration.outputs == "gradient"

    def _lessons(self, calls: list, bar: Progress) -> Lessons:
        """What all blocks are refitted on; it is written while the model is the original one."""
        lessons = Lessons(self.loaded, self.blocks, calls, self.tokens, self.recipe, self.device)
        self.written = lessons.steps
        bar.resize(self.steps)
        if self.committed.is_done:
            bar.skip(lessons.steps)
        elif lessons.steps:
            bar.phase("text written by the model")
            with self._stage("write"):
                lessons.prepare(self.workdir, bar.advance)
        return lessons

    def _gradients(
        self, calls: list, hidden: Tensor, bar: Progress
    ) -> list[dict[str, Tensor]] | None:
        """What every token counts for each linear, where gradients decide; keeps `outputs`."""
        if not (self._by_token or self._by_output):
            return None
        if self.committed.is_compressed:  # they could decide nothing any more
            bar.skip(self._steps_of_gradients)
            return None
        bar.phase("gradients of the text")
        left = [own if i >= self.committed.count else {} for i, own in enumerate(self.linears)]
        by_token = TokenGradients(left, self.tokens) if self._by_token else None
        by_output = OutputGrams(left) if self._by_output else None
        with self._stage("gradients"):
            look_at_gradients(
                self.model,
                self.blocks,
                left,
                hidden,
                calls,
                self.tokens,
                [taker for taker in (by_token, by_output) if taker is not None],
                device=self.device,
                advance=bar.advance,
            )
        if by_output is not None:
            self.outputs = by_output.found
        return None if by_token is None else by_token.found

    def _coarse_stage(self, calls: list, hidden: Tensor, bar: Progress) -> Kept | None:
        """How many of every M weights each linear keeps; None where no weight is pruned."""
        if self.recipe.nm is None:
            return None
        stage = CoarseStage(
            self.recipe, self.blocks, calls, hidden, self.linears, self.method, self.device
        )
        self.coarse = stage.steps
        bar.resize(self.steps)
        facts = self._importance(stage, bar) if stage.steps else {}
        kept, mean = stage.kept(facts)
        self.result.report |= {"mean_kept": mean, **facts}
        return kept

    def _importance(self, stage: CoarseStage, bar: Progress) -> dict[str, Any]:
        """What the coarse stage measures, unless an interrupted run has done so."""
        bar.phase("coarse stage: what each part of the model matters")
        facts = self.workdir.fetch("coarse") if self.workdir is not None else None
        if facts is not None:
            bar.skip(stage.steps)
            return facts
        with self._stage("coarse"):
            facts = stage.look(bar.advance)
        if self.workdir is not None:
            self.workdir.store("coarse", facts)
        return facts

    def _open_log(self) -> LinearLog | None:
        """The log of this run, starting with the lines of the blocks that are committed already."""
        if self.workdir is None:
            return None
        return LinearLog(self.workdir.path / "log.jsonl", self.committed.log())

    def _compress_block(
        self,
        i: int,
        calibrator: Calibrator,
        kept: dict[str, int] | None,
        bar: Progress,
        log: LinearLog | None,
    ) -> None:
        """Capture what the block's linears see, compress them in place, refit, commit the block."""
        block, linears = self.blocks.modules[i], self.linears[i]
        lines = []
        with self._stage("capture"):
            target = calibrator.block_output(i, bar.advance)
        rounds = calibrator.rounds(i, linears, bar.advance)
        while (stats := self._next_round(rounds)) is not None:
            for name in (name for name in linears if name in stats):
                bar.update(linear=name)
                nm = None if kept is None else (kept[name], self.recipe.nm[1])
                with self._stage("compress"):
                    line = self._compress_linear(i, name, calibrator, stats[name], nm)
                bar.update(loss=line["loss"])
                bar.advance(self._linear_steps)
                lines.append(line)
                if log is not None:
                    log.write(line)
        linears.clear()  # or the dense weights would live on
        for name in self.names[i]:
            block.get_submodule(name).drop_dense()
        if self.recipe.refit.steps:
            with self._stage("refit"):
                lines.append(self._refit(i, calibrator, target, bar))
        self.result.log += lines
        with self._stage("commit"):
            self.committed.commit(i, lines)
            self._store_seconds()

    def _next_round(self, rounds: Iterator[Statistics]) -> Statistics | None:
        with self._stage("capture"):
            return next(rounds, None)

    def _compress_linear(
        self,
        i: int,
        name: str,
        calibrator: Calibrator,
        inputs: GramAccumulator,
        nm: tuple[int, int] | None,
    ) -> dict[str, Any]:
        """Put a packed linear in the place of a linear of block `i`; its line in the log."""
        begun = time.monotonic()
        full, linear = f"{self.blocks.name(i)}.{name}", self.linears[i][name]
        outputs = self.outputs[i].pop(name, None)
        G = None if outputs is None else outputs.H.to(self.device)
        stats = LinearStats(inputs.H, inputs.tokens, full, inputs.mean, G, inputs.weight)
        W = weight_of(linear).to(self.device, torch.float32)
        result = self.method.compress(calibrator.target(W, inputs), stats, nm)
        packed = PackedLinear.from_compressed(result, linear.bias, self.model.dtype)
        packed.to(weight_of(linear).device)
        replace_module(self.blocks.modules[i], name, packed)
        packed.keep_dense = True  # the next round of a sequential calibration runs it
        bits = packed.bits()
        record = {
            "shape": list(result.shape),
            "nm": None if nm is None else list(nm),
            **result.record,
            "paper_bits": bits.paper_bits,
            "stored_bits": bits.stored_bits,
        }
        if self.recipe.asymmetry.strength:  # W was perhaps not what the method aimed at
            record["loss_of_original"] = relative_loss(W, result.dequantize(), inputs.H)
        self.result.records[full] = record
        timing = {"seconds": round(time.monotonic() - begun, 4), "peak_rss_bytes": peak_rss_bytes()}
        return {"block": i, "name": full, **record, **timing}

    def _refit(
        self, i: int, calibrator: Calibrator, target: Tensor | None, bar: Progress
    ) -> dict[str, Any]:
        """Tune the block by gradients; its line in the log."""
        bar.update(linear="refit")
        begun = time.monotonic()
        done = refit_block(
            self.blocks.modules[i],
            self.names[i],
            calibrator.hidden,
            calibrator.originals if target is None else target,
            calibrator.calls[i],
            self.recipe.refit,
            frozen=self._frozen(i),
            device=self.device,
            advance=lambda steps: bar.advance(steps * _REFIT_STEPS),
        )
        return {"block": i, "name": self.blocks.name(i), **_refit_facts(done, begun)}

    def _frozen(self, i: int) -> set[str]:
        """Names of the parameters of a block that are to be left as they are."""
        names = (name for name, _ in self.blocks.modules[i].named_parameters())
        block = self.blocks.name(i)
        return {name for name in names if is_skipped(f"{block}.{name}", self.recipe.skip)}

    def _refit_model(self, calibrator: Calibrator, lessons: Lessons, bar: Progress) -> None:
        """Tune all blocks together, and commit every one of them a second time."""
        bar.phase("refitting all blocks together")
        if self.committed.is_refitted:
            bar.skip(self._steps_of_model)
            self.result.log += self.committed.refit_log()
            return
        with self._stage("refit model"):
            begun = time.monotonic()
            # one after the other: each takes as much memory as all calibration did, or more
            target = lessons.target(calibrator.release())
            hidden = lessons.inputs()
            done = refit_model(
                self.model,
                self.blocks,
                self.names,
                hidden,
                target,
                lessons.calls,
                self.recipe.refit,
                lessons.order(),
                frozen=[self._frozen(i) for i in range(len(self.names))],
                device=self.device,
                shelf=self.workdir,
                advance=lambda runs: bar.advance(runs / lessons.pieces),
                skip=lambda runs: bar.skip(runs / lessons.pieces),
            )
        self.result.log.append({"name": "all blocks", **_refit_facts(done, begun)})
        with self._stage("commit"):
            self.committed.commit_refitted(self.result.log[-1])

    def _restore(self, i: int) -> None:
        """Put a committed block in place, as it was when it was committed."""
        lines = self.committed.restore(i, self.linears[i], self.model.dtype)
        self.linears[i].clear()
        for line in lines:
            if "refit" not in line:
                facts = {k: v for k, v in line.items() if k not in _VARYING}
                self.result.records[line["name"]] = facts
        self.result.log += lines

    def _fetch_seconds(self) -> dict[str, float]:
        """Seconds by stage, and in total, of the parts of this run that were cut off."""
        return (self.workdir and self.workdir.fetch("seconds")) or {}

    def _store_seconds(self) -> None:
        if self.workdir is not None:
            self.workdir.store("seconds", self._seconds())

    def _seconds(self) -> dict[str, float]:
        return {"total": time.monotonic() - self.started, **self.seconds}

    def _finish(self, kept: Kept | None) -> None:
        self.result.report |= {
            "kept": kept,
            "m": None if self.recipe.nm is None else self.recipe.nm[1],
            **totals(self.result.records.values()),
            "seconds": self._seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun


def _refit_facts(done: Refit, begun: float) -> dict[str, Any]:
    """What a line of the log says about a refit that began at `begun`."""
    facts = {"before": done.before, "after": done.after, "steps": done.steps}
    return {"refit": facts, "seconds": round(time.monotonic() - begun, 4)}


_REFIT_STEPS = 3  # a step of refitting takes about three times as long as running a window
_VARYING = ("block", "name", "seconds", "peak_rss_bytes")  # of a log line: not part of a record
