"""The main job: a model and a little text in, the same model with packed linears out.

Read `compress` from top to bottom. Blocks are taken in order; each is calibrated on the outputs of
the blocks that are already compressed, and committed to disk before the next one begins.
"""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import subbit
from subbit.binarize import descent
from subbit.calibration import Calibrator, Statistics
from subbit.coarse import CoarseStage, Kept
from subbit.committed import commit_of, restore_block
from subbit.errors import ModelError, RecipeError
from subbit.hub.atomic import save_atomically
from subbit.hub.save import save_packed
from subbit.lessons import Lessons
from subbit.linalg import GramAccumulator
from subbit.methods import LinearStats, Method, Settings, make_method
from subbit.model import (
    Blocks,
    LoadedModel,
    OutputGrams,
    TokenGradients,
    check_coverage,
    check_finite,
    find_blocks,
    find_linears,
    fingerprint,
    first_inputs,
    is_skipped,
    load_model,
    look_at_gradients,
    record_calls,
    replace_module,
    weight_of,
)
from subbit.model.capture import placed
from subbit.packed.layout import FORMAT_VERSION
from subbit.packed.linear import PackedLinear, dense_cache, packed_modules
from subbit.places import parse_device, parse_dtype
from subbit.recipe import Recipe, load_recipe
from subbit.refit import JUDGED, STEP, Refit, refit_block, refit_model
from subbit.run.commits import Workdir, check_output
from subbit.run.log import LinearLog
from subbit.run.memory import peak_rss_bytes
from subbit.run.progress import Progress
from subbit.text import SELF, Windows, calibration_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CompressedModel", "compress"]


@dataclass
class CompressedModel:
    """What `compress` returns.

    Attributes:
        model: the model, its linears replaced by `PackedLinear`s.
        tokenizer: its tokenizer, or None.
        recipe: the recipe that was used, all overrides applied.
        calibration: where the calibration tokens came from, and their fingerprint.
        records: dotted name of each linear -> facts about its fit; the same in every run.
        report: totals of this run: seconds a stage, peak memory, kept weights, bits.
        log: one line per linear, as in `compression.jsonl`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    recipe: Recipe
    calibration: dict[str, Any]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    base_model: str | None = None

    def save_pretrained(self, out: str | Path, max_shard_size: str = "5GB") -> None:
        """Write the packed model folder, atomically; see `subbit.load`.

        Raises:
            OutputError: `out` exists or cannot be made.
        """
        save_atomically(Path(out), lambda folder: self.write(folder, max_shard_size))

    def write(self, folder: Path, max_shard_size: str = "5GB") -> None:
        """Fill an existing folder with the packed model and its log."""
        save_packed(
            self.model,
            self.tokenizer,
            folder,
            recipe=self.recipe.model_dump(mode="json"),
            calibration=self.calibration,
            records=self.records,
            base_model=self.base_model,
            max_shard_size=max_shard_size,
        )
        with LinearLog(folder / "compression.jsonl", self.log) as log:
            log.write({"run": self.report})


def compress(
    model: "str | Path | PreTrainedModel",
    recipe: str | Path | Recipe = "pbs2p-6-8",
    calibration: str | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: str | Path | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: str = "auto",
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> CompressedModel:
    """Compress the linears of a causal LM.

    Args:
        model: hub id, local folder, `.gguf` file, or a loaded model (changed in place).
        recipe: name of a shipped recipe, a YAML file, or a `Recipe`.
        calibration: text source (`c4`, `wikitext2`, `ptb`, a file, `stdlib`, `self`) instead of
            the recipe's; likewise `nsamples` and `seqlen`.
        tokenizer: needed when `model` is a loaded model.
        out: folder to write; finished blocks are committed beside it and an interrupted run
            resumes. None keeps everything in memory.
        device: where the work is done: "auto", "cpu", "cuda", "cuda:1"...
        dtype: dtype the model is run in: "auto", "float32", "bfloat16" or "float16".
        resume: "auto", "required" or "never".
        overrides: `key=value` changes to the recipe.
        progress: show a progress bar on stderr.

    Raises:
        SubbitError: anything the user can mend, before hours of work wherever possible.
    """
    recipe = _settle(recipe, calibration, nsamples, seqlen, overrides)
    method = make_method(
        recipe.method,
        recipe.options,
        Settings(recipe.blocksize, recipe.percdamp, recipe.calibration.seed, recipe.levels),
    )
    method.check_nm(recipe.nm)
    if recipe.calibration.outputs == "gradient":
        method.check_outputs()
    if out is not None:
        check_output(Path(out), resume)
    place, wanted = parse_device(device), parse_dtype(dtype)
    if progress and not isinstance(model, nn.Module):
        print(f"loading {model}", file=sys.stderr, flush=True)
    loaded = _load(model, tokenizer, wanted)
    if packed_modules(loaded.model):
        raise ModelError("the model is already compressed by subbit; give the original one")
    check_finite(loaded.model)
    blocks = find_blocks(loaded.model)
    check_coverage(loaded.model, blocks, recipe.skip)
    samples = recipe.calibration.source == SELF
    windows = None if samples else _windows(recipe, loaded)
    with ExitStack() as stack:
        workdir = None
        if out is not None:
            identity = _identity(recipe, loaded, windows, place)
            workdir = stack.enter_context(Workdir.open(Path(out), identity, resume))
        if samples:  # it takes long, so that what was sampled is kept in the work folder
            windows = _sampled(recipe, loaded, place, workdir, progress)
        job = _Job(loaded, blocks, windows, recipe, method, place, workdir)
        with Progress(job.steps, enabled=progress) as bar:
            result = job.run(bar)
            if workdir is not None:
                bar.phase("writing")
                workdir.publish(result.write)
    return result


def _settle(
    recipe: str | Path | Recipe,
    calibration: str | None,
    nsamples: int | None,
    seqlen: int | None,
    overrides: Sequence[str],
) -> Recipe:
    """Apply everything that the caller changes about the recipe."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = recipe.override(list(overrides))
    given = {"source": calibration, "nsamples": nsamples, "seqlen": seqlen}
    named = [f"calibration.{key}={value}" for key, value in given.items() if value is not None]
    return recipe.override(named)


def _load(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: torch.dtype | str,
) -> LoadedModel:
    if not isinstance(model, nn.Module):
        loaded = load_model(model, dtype=dtype)
        return loaded if tokenizer is None else replace(loaded, tokenizer=tokenizer)
    if tokenizer is None:
        raise RecipeError("compress() was given a loaded model without tokenizer; pass tokenizer=")
    if dtype != "auto":
        model.to(dtype)
    return LoadedModel(model.eval(), tokenizer, model.config._name_or_path, "memory")


def _windows(recipe: Recipe, loaded: LoadedModel, **sampling: Any) -> Windows:
    spec = recipe.calibration
    return calibration_windows(
        spec.source,
        loaded.tokenizer,
        loaded.model,
        nsamples=spec.nsamples,
        seqlen=spec.seqlen,
        bos=spec.bos,
        sample=spec.sample,
        seed=spec.seed,
        **sampling,
    )


def _sampled(
    recipe: Recipe,
    loaded: LoadedModel,
    device: torch.device,
    workdir: Workdir | None,
    progress: bool,
) -> Windows:
    """Calibration windows that the model writes itself."""
    spec = recipe.calibration
    with Progress(spec.nsamples * spec.seqlen, enabled=progress) as bar:
        bar.phase("sampling calibration text from the model")
        with placed(loaded.model, device):
            return _windows(recipe, loaded, shelf=workdir, advance=bar.advance)


def _identity(
    recipe: Recipe, loaded: LoadedModel, windows: Windows | None, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the result; a run resumes only where all of it is the same.

    Text that the model is yet to write (`windows` is None) follows from the rest.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": {"source": loaded.source, "sha256": fingerprint(loaded.model)},
        "calibration": SELF if windows is None else windows.to_dict(),
        "dtype": str(loaded.model.dtype),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "descent": "compiled" if descent.is_compiled() else "torch",
        "versions": {
            "subbit": subbit.__version__,
            "format": FORMAT_VERSION,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "safetensors")},
        },
    }


class _Job:
    """One run over the blocks of a model."""

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
        self.outputs: list[dict[str, GramAccumulator]] = [{} for _ in self.linears]
        self.seconds: dict[str, float] = {}
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
        steps, judged = self.recipe.refit.model_steps, 2 * min(JUDGED, len(self.tokens))
        return len(self.blocks.modules) * (STEP * steps + judged) if steps else 0

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
        started = time.monotonic()
        calls = record_calls(self.model, self.blocks, self.tokens)
        hidden = first_inputs(self.model, self.blocks, self.tokens)
        lessons = self._lessons(calls, bar)
        gradients = self._gradients(calls, hidden, bar)
        calibrator = Calibrator(self.recipe, self.blocks, calls, hidden, self.device, gradients)
        self.passes = calibrator.passes(self.linears[0])
        bar.resize(self.steps)
        kept = self._coarse_stage(calls, hidden, bar)
        log = self._open_log()
        count = len(self.blocks.modules)
        whole = self._committed >= count  # then nobody reads the compressed model's hidden states
        bar.phase("compressing")
        for i, block in enumerate(self.blocks.modules):
            bar.update(block=i + 1, nblocks=count)
            if i < self._committed:
                if not self._is_done:
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
        self._finish(kept, time.monotonic() - started)
        return self.result

    @property
    def _committed(self) -> int:
        """Blocks that an interrupted run has compressed."""
        return 0 if self.workdir is None else self.workdir.committed

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
        if self._is_done:
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
        if self._committed >= len(self.names):  # they could decide nothing any more
            bar.skip(self._steps_of_gradients)
            return None
        bar.phase("gradients of the text")
        left = [own if i >= self._committed else {} for i, own in enumerate(self.linears)]
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
        lines = [
            line
            for i in range(min(self.workdir.committed, len(self.blocks.modules)))
            for line in self.workdir.meta(i)["log"]
        ]
        return LinearLog(self.workdir.path / "log.jsonl", lines)

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
                full = f"{self.blocks.name(i)}.{name}"
                bar.update(linear=name)
                with self._stage("compress"):
                    begun = time.monotonic()
                    W = weight_of(linears[name]).to(self.device, torch.float32)
                    W = calibrator.target(W, stats[name])
                    nm = None if kept is None else (kept[name], self.recipe.nm[1])
                    known = self._known(full, stats[name], self.outputs[i].pop(name, None))
                    packed, record = self._compress_linear(linears[name], W, known, nm)
                    seconds = time.monotonic() - begun
                replace_module(block, name, packed)
                packed.keep_dense = True  # the next round of a sequential calibration runs it
                bar.update(loss=record["loss"])
                bar.advance(self._linear_steps)
                timing = {"seconds": round(seconds, 4), "peak_rss_bytes": peak_rss_bytes()}
                lines.append({"block": i, "name": full, **record, **timing})
                if log is not None:
                    log.write(lines[-1])
                self.result.records[full] = record
        linears.clear()  # or the dense weights would live on
        for name in self.names[i]:
            block.get_submodule(name).drop_dense()
        if self.recipe.refit.steps:
            with self._stage("refit"):
                lines.append(self._refit(i, calibrator, target, bar))
        self.result.log += lines
        if self.workdir is not None:
            with self._stage("commit"):
                loose = self.recipe.refit.steps > 0
                self.workdir.commit(i, *commit_of(block, self.names[i], lines, loose))

    def _next_round(self, rounds: Iterator[Statistics]) -> Statistics | None:
        with self._stage("capture"):
            return next(rounds, None)

    def _known(
        self, name: str, inputs: GramAccumulator, outputs: GramAccumulator | None
    ) -> LinearStats:
        """What calibration says about a linear."""
        G = None if outputs is None else outputs.H.to(self.device)
        return LinearStats(inputs.H, inputs.tokens, name, inputs.mean, G, inputs.weight)

    def _compress_linear(
        self, linear: nn.Module, W: Tensor, stats: LinearStats, nm: tuple[int, int] | None
    ) -> tuple[PackedLinear, dict[str, Any]]:
        result = self.method.compress(W, stats, nm)
        packed = PackedLinear.from_compressed(result, linear.bias, self.model.dtype)
        packed.to(weight_of(linear).device)
        bits = packed.bits()
        record = {
            "shape": list(result.shape),
            "nm": None if nm is None else list(nm),
            **result.record,
            "paper_bits": bits.paper_bits,
            "stored_bits": bits.stored_bits,
        }
        return packed, record

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
        if self.workdir is not None and self._is_refitted:
            bar.skip(self._steps_of_model)
            line = self.workdir.fetch("refit")
            self.result.log += [line] if line else []
            return
        with self._stage("refit model"):
            begun = time.monotonic()
            hidden, target, order = lessons.windows(calibrator.originals)
            done = refit_model(
                self.model,
                self.blocks,
                self.names,
                hidden,
                target,
                calibrator.calls,
                self.recipe.refit,
                order,
                frozen=[self._frozen(i) for i in range(len(self.names))],
                device=self.device,
                shelf=self.workdir,
                advance=bar.advance,
                skip=bar.skip,
            )
        self.result.log.append({"name": "all blocks", **_refit_facts(done, begun)})
        if self.workdir is not None:
            with self._stage("commit"):
                self._commit_again()

    @property
    def _is_refitted(self) -> bool:
        """Whether all blocks are committed as refitting the model left them."""
        return self.workdir.committed == 2 * len(self.blocks.modules)

    @property
    def _is_done(self) -> bool:
        """Whether all that is to be committed is: only the writing was cut off."""
        rounds = 2 if self.recipe.refit.model_steps else 1
        return self.workdir is not None and self.workdir.committed == rounds * len(
            self.blocks.modules
        )

    def _commit_again(self) -> None:
        """Commit the refitted blocks behind the others; those an interrupted run has are there."""
        self.workdir.store("refit", self.result.log[-1])
        count = len(self.blocks.modules)
        for i in range(self.workdir.committed - count, count):
            lines = self.workdir.meta(i)["log"]
            commit = commit_of(self.blocks.modules[i], self.names[i], lines, True)
            self.workdir.commit(count + i, *commit)

    def _restore(self, i: int) -> None:
        """Put a committed block in place, as it was when it was committed."""
        again = len(self.blocks.modules) if self._is_refitted else 0
        tensors, meta = self.workdir.load(again + i)
        restore_block(self.blocks.modules[i], self.linears[i], tensors, meta, self.model.dtype)
        self.linears[i].clear()
        for line in meta["log"]:
            if "refit" in line:
                continue
            facts = {k: v for k, v in line.items() if k not in _VARYING}
            self.result.records[line["name"]] = facts
        self.result.log += meta["log"]

    def _finish(self, kept: Kept | None, seconds: float) -> None:
        records = self.result.records.values()
        weights = [record["shape"][0] * record["shape"][1] for record in records]

        def mean(key: str) -> float:
            return sum(r[key] * w for r, w in zip(records, weights)) / sum(weights)

        self.result.report |= {
            "kept": kept,
            "m": None if self.recipe.nm is None else self.recipe.nm[1],
            "linears": len(weights),
            "weights": sum(weights),
            "mean_loss": sum(record["loss"] for record in records) / len(weights),
            "paper_bits": mean("paper_bits"),
            "stored_bits": mean("stored_bits"),
            "salient_share": mean("salient_share"),
            "seconds": {"total": seconds, **self.seconds},
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
