"""Files that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subbit.errors import OutputError

__all__ = [
    "TEMPORARY",
    "file_sha256",
    "json_sha256",
    "plain_json",
    "read_json",
    "sync_folder",
    "sync_tree",
    "write_atomic",
    "write_json",
]

TEMPORARY = ".tmp-"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, sync it, and rename it to `path`.

    After a crash at any point `path` holds what it held before, or the new content.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; make room and run the same command "
            "again to go on"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; see `write_atomic`."""
    text = json.dumps(value, indent=1, ensure_ascii=True)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="ascii") and None)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def plain_json(value: Any) -> Any:
    """Return `value` as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def json_sha256(value: Any) -> str:
    """Return the sha256 (hex) of a value of `plain_json`; equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Make every file and name below `folder` survive a power cut."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
