"""What a run refuses before it begins: wrong places, other settings, a second process."""

import fcntl
import os
from pathlib import Path
from typing import Any, Literal

from subbit.errors import CheckpointError, OutputError
from subbit.run.atomic import TEMPORARY

__all__ = ["LOCK", "RUN", "SUFFIX", "Resume", "check_output", "differences", "take_lock"]

Resume = Literal["auto", "required", "never"]

LOCK, RUN, SUFFIX = ".lock", "run.json", ".partial"


def check_output(out: Path, resume: Resume = "auto") -> Path:
    """Check, before any work, that `out` can be made; return the folder the run will work in.

    Raises:
        OutputError: `out` exists, its parent is missing or not writable, or `<out>.partial` is
            something else than an unfinished run.
        CheckpointError: `resume="required"` and there is no unfinished run.
    """
    out = Path(os.path.abspath(out))
    path = out.with_name(out.name + SUFFIX)
    if os.path.lexists(out):
        remedy = "remove it or choose another folder"
        if (path / RUN).is_file():  # cut off while it was being cleared away, or out is another's
            remedy = f"if it is the finished model, only {path} is left to be removed; or {remedy}"
        raise OutputError(f"the output {out} exists already; {remedy}")
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} of the output does not exist; create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {out.parent} of the output is not writable")
    if os.path.lexists(path) and not _is_run(path):
        raise OutputError(f"{path} is in the way and is no unfinished run; move it away")
    if resume == "required" and not (path / RUN).is_file():
        raise CheckpointError(f"there is no unfinished run to resume at {path}; use --resume auto")
    return path


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        return False
    ours = (path / RUN).is_file()  # without it: a run that was killed at its very first step
    return ours or all(p.name == LOCK or p.name.startswith(TEMPORARY) for p in path.iterdir())


def take_lock(path: Path) -> int:
    """Make the folder `path` if need be and lock it; return the descriptor that holds the lock.

    The lock is the kernel's: it is gone when the process is, however it ended.

    Raises:
        CheckpointError: another process holds the lock.
        OutputError: the folder cannot be made, or its file system has no locks.
    """
    while True:
        try:
            path.mkdir(exist_ok=True)
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # removed between the two steps by the process that was at work here
        except OSError as error:
            raise OutputError(f"cannot make the folder {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise CheckpointError(
                f"another process is at work in {path}; wait for it or choose another folder"
            ) from None
        except OSError as error:
            os.close(fd)
            raise OutputError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks; choose "
                "an output folder on another one"
            ) from error
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path / LOCK)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # we locked a file that its owner has just removed


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one short text for each setting that differs, keys of nested dicts dotted."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**new, **old} if old.get(key, _NONE) != new.get(key, _NONE)]
    return [f"{key} was {_short(old, key)} and is {_short(new, key)}" for key in keys]


_NONE = object()


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat


def _short(flat: dict[str, Any], key: str, width: int = 40) -> str:
    if key not in flat:
        return "absent"
    text = str(flat[key])
    return text if len(text) <= width else f"{text[: width - 1]}…"
