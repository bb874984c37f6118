"""Commits of a run: finished blocks survive Ctrl-C, kill -9 and power cuts.

A run works in `<out>.partial/` beside its output folder:

    .lock                    held (flock) by the process at work
    run.json                 the settings that the run was started with
    state-<name>.json        small results, such as the coarse allocation
    state-<name>-0.safetensors  tensors that belong to one (or -1: the two take turns)
    block-0007.safetensors   the tensors of one finished block
    block-0007.json          its size and sha256, and what else belongs to the block
    log.jsonl                one line per linear, if the job writes it here

Every file appears by atomic rename. A block counts only if its json is there and the hash fits. The
finished model folder is built inside and appears at `<out>` by one rename.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subbit.errors import CheckpointError, OutputError
from subbit.run.atomic import (
    TEMPORARY,
    file_sha256,
    json_sha256,
    plain_json,
    read_json,
    sync_folder,
    sync_tree,
    write_atomic,
    write_json,
)
from subbit.run.guards import LOCK, RUN, SUFFIX, Resume, check_output, differences, take_lock

__all__ = ["Resume", "Workdir", "check_output"]

_FINAL = "final"


class Workdir:
    """The folder of one run, held by this process until it is published, discarded or closed.

    Attributes:
        path: `<out>.partial`.
        out: the output folder.
        committed: number of consecutive valid blocks.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.out = path.with_name(path.name.removesuffix(SUFFIX))
        self.committed = 0
        self._lock: int | None = lock

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], resume: Resume = "auto") -> "Workdir":
        """Start a run that will make the folder `out`, or go on with the unfinished one.

        Args:
            out: the output folder; must not exist.
            fingerprint: JSON-able settings that decide the result (recipe, model, calibration,
                versions, dtype, device type); nested dicts are compared key by key.
            resume: `auto` goes on where it can; `required` refuses to start from nothing; `never`
                throws the unfinished run away.

        Raises:
            OutputError: `out` exists or cannot be made, or `<out>.partial` is something else.
            CheckpointError: the unfinished run had other settings, is held by another process, or
                is not there although `resume="required"`.
        """
        path = check_output(out, resume)
        workdir = cls(path, take_lock(path))
        try:
            check_output(out, resume)  # again: the process before us may just have finished
            workdir._begin(plain_json(fingerprint), resume)
        except BaseException:
            workdir.close()
            raise
        return workdir

    def _begin(self, fingerprint: dict[str, Any], resume: Resume) -> None:
        run = self.path / RUN
        if resume == "never" or not run.exists():
            self._clear()
            write_json(run, {"fingerprint": fingerprint})
            return
        before = (read_json(run) or {}).get("fingerprint")
        if before is None:
            raise CheckpointError(f"{run} is damaged; use --resume never to start over")
        changes = differences(before, fingerprint)
        if changes:
            raise CheckpointError(
                f"the unfinished run at {self.path} had other settings: {'; '.join(changes)}; "
                "pass the old settings to go on, or --resume never to start over"
            )
        while self._is_valid(self.committed):
            self.committed += 1
        keep = {path for index in range(self.committed) for path in self._files(index)}
        for path in set(self.path.iterdir()) - keep:
            if path.name.startswith((TEMPORARY, "block-")):
                path.unlink()

    def commit(self, index: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write block `index` (the next one) durably.

        Args:
            index: index of the block; must equal `committed`.
            tensors: any tensors, on any device.
            meta: JSON-able facts, such as the block's log lines.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        if index != self.committed:
            raise ValueError(f"block {index} was committed, but the next one is {self.committed}")
        file, note = self._files(index)
        write_atomic(file, lambda temporary: _save(tensors, temporary))
        meta = plain_json(meta)
        seal = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        write_json(note, {"index": index, **seal, "meta_sha256": json_sha256(meta), "meta": meta})
        self.committed = index + 1

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors (on the CPU) and the meta of a committed block.

        Raises:
            CheckpointError: the block is not committed, or was damaged since this run began.
        """
        file, _ = self._files(index)
        meta = self.meta(index)
        try:
            return load_file(file), meta
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the committed block {file} cannot be read ({error}); run again to redo it"
            ) from error

    def meta(self, index: int) -> dict[str, Any]:
        """Return the meta of a committed block alone.

        Raises:
            CheckpointError: the block is not committed.
        """
        record = read_json(self._files(index)[1]) if 0 <= index < self.committed else None
        if record is None:
            raise CheckpointError(f"block {index} is not among the committed blocks of {self.path}")
        return record["meta"]

    def store(self, name: str, value: Any) -> None:
        """Keep a small JSON-able value under `name`.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        value = plain_json(value)
        write_json(self._state(name), {"sha256": json_sha256(value), "value": value})

    def fetch(self, name: str) -> Any:
        """Return the value kept under `name`, or None if there is none or it was damaged."""
        record = read_json(self._state(name)) or {}
        value = record.get("value")
        return value if record.get("sha256") == json_sha256(value) else None

    def store_tensors(self, name: str, tensors: dict[str, Tensor], value: Any) -> None:
        """Keep tensors and a small JSON-able value under `name`, in the place of those before.

        Raises:
            OutputError: the disk is full or the file cannot be written.
        """
        slots = [self.path / f"state-{name}-{i}.safetensors" for i in range(2)]
        before = (self.fetch(name) or {}).get("file")
        new, old = slots if before != slots[0].name else reversed(slots)
        write_atomic(new, lambda temporary: _save(tensors, temporary))
        self.store(name, {"file": new.name, "sha256": file_sha256(new), "value": value})
        old.unlink(missing_ok=True)

    def fetch_tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors (on the CPU) and the value kept under `name`.

        None if there are none or they were damaged.
        """
        note = self.fetch(name)
        if note is None:
            return None
        file = self.path / note["file"]
        try:
            if file_sha256(file) == note["sha256"]:
                return load_file(file), note["value"]
        except (OSError, SafetensorError):
            pass
        return None

    def publish(self, build: Callable[[Path], None]) -> None:
        """Let `build` fill a folder, rename that folder to `out`, and remove the workdir.

        Raises:
            OutputError: `out` has come into being meanwhile, or the disk is full.
        """
        final = self.path / _FINAL
        try:
            if final.exists():
                shutil.rmtree(final)
            final.mkdir()
            build(final)
            sync_tree(final)
            if os.path.lexists(self.out):
                raise OutputError(
                    f"the output {self.out} came into being during the run; move it away and run "
                    "the same command again to finish"
                )
            os.rename(final, self.out)
            sync_folder(self.out.parent)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot write {self.out}: {reason}; run the same command again to finish"
            ) from error
        self.discard()

    def discard(self) -> None:
        """Remove the workdir and everything in it."""
        self._clear()
        for name in (RUN, LOCK):  # last, so that a crash in between leaves a folder we know
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the workdir and leave it as it is, to be resumed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _is_valid(self, index: int) -> bool:
        file, note = self._files(index)
        record = read_json(note) or {}
        try:
            return (
                record["index"] == index
                and record["meta_sha256"] == json_sha256(record["meta"])
                and record["size"] == file.stat().st_size
                and record["sha256"] == file_sha256(file)
            )
        except (OSError, KeyError):
            return False

    def _files(self, index: int) -> tuple[Path, Path]:
        stem = f"block-{index:04d}"
        return self.path / f"{stem}.safetensors", self.path / f"{stem}.json"

    def _state(self, name: str) -> Path:
        return self.path / f"state-{name}.json"

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name in (LOCK, RUN):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: _owning(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how a full disk shows itself here
        raise OSError(str(error)) from error


def _owning(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU with a storage of its own, as safetensors asks for."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if shared else tensor
