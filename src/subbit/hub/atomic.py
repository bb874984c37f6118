"""A folder or a file that appears complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from subbit.errors import OutputError

__all__ = ["save_atomically", "save_file_atomically"]


def save_atomically(out: str | Path, build: Callable[[Path], None]) -> Path:
    """Let `build` fill a temporary folder beside `out`, then rename it to `out`.

    Args:
        out: the folder to make; it may exist only if it is empty.
        build: writes everything into the folder it is given.

    Returns:
        `out` as a path.

    Raises:
        OutputError: `out` exists and is not an empty folder, or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"'{out}' exists already; remove it or choose another output folder.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(
            f"'{out}' cannot be written ({error.strerror}); choose another output folder."
        ) from error
    try:
        work = scratch / out.name  # mkdtemp's own folder is private, this one has the usual mode
        work.mkdir()
        build(work)
        _flush(work)
        os.replace(work, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"'{out}' could not be written: {error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def save_file_atomically(out: str | Path, write: Callable[[Path], None]) -> Path:
    """As `save_atomically`, for one file; it must not exist.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise OutputError(f"'{out}' exists already; remove it or choose another output file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            write(Path(scratch) / out.name)
            _flush(Path(scratch))
            os.replace(Path(scratch) / out.name, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"'{out}' could not be written: {error}.") from error
    return out


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename, so that a power cut leaves no empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
