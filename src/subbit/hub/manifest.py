"""`subbit.json`: size and SHA-256 of every file of a packed folder, and of itself.

Not of the card, nor of the log of the compression, whose times make it another one every time.

A folder is believed only after every byte of it has been read and compared; a flipped bit in a
config, a tokenizer or a shard stops the load before anything is built from it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from subbit.errors import FormatError

__all__ = ["MANIFEST", "has_manifest", "verify_manifest", "write_manifest"]

MANIFEST = "subbit.json"
_AGAIN = "copy or download the folder again"
# Left by other tools inside a folder, never part of the model; and the model card, which is there
# to be edited.
_FOREIGN = {".git", ".cache", "__pycache__", ".gitattributes", "README.md"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _serialise(content: dict[str, Any]) -> bytes:
    """The one way to write a manifest; its last entry is the digest of all before it."""
    body = json.dumps(content, indent=2, sort_keys=True)
    signed = content | {"sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(signed, indent=2, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path != folder / MANIFEST
        and not _FOREIGN.intersection(path.relative_to(folder).parts)
    )


def has_manifest(folder: Path) -> bool:
    """Whether `folder` carries a manifest; one re-saved by transformers does not."""
    return (folder / MANIFEST).is_file()


def write_manifest(folder: Path, format_version: int) -> Path:
    """Write (or renew, after an intended edit) the manifest of all files now in `folder`.

    Args:
        folder: a complete packed folder.
        format_version: version of the packed format that the folder holds.

    Returns:
        The path of the manifest.
    """
    entries = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in _files(folder)
    }
    path = folder / MANIFEST
    path.write_bytes(_serialise({"format_version": format_version, "files": entries}))
    return path


def _read(folder: Path, newest: int) -> dict[str, Any]:
    """Return the verified entries of the manifest."""
    path = folder / MANIFEST
    raw = path.read_bytes()
    damaged = FormatError(f"{path} is damaged: its own checksum does not match; {_AGAIN}.")
    try:
        content = json.loads(raw)
        version, entries = content["format_version"], content["files"]
        content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if _serialise(content) != raw:
        raise damaged
    if type(version) is not int or version > newest:
        raise FormatError(
            f"{path} says format version {version}, this subbit reads up to {newest}; "
            "upgrade subbit (pip install -U subbit)."
        )
    return entries


def verify_manifest(folder: Path, newest: int) -> None:
    """Compare every file of `folder` with its manifest, reading all of them once.

    Args:
        folder: a packed folder that has a manifest.
        newest: the newest format version this program reads.

    Raises:
        FormatError: a file is missing, truncated or changed, or the format is newer; the message
            names the file, what was expected and what was found.
    """
    for name, entry in _read(folder, newest).items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{name} is missing from {folder}; {_AGAIN}.")
        size = path.stat().st_size
        if size != entry["size"]:
            raise FormatError(
                f"{name} in {folder} has {size} bytes instead of the {entry['size']} that "
                f"{MANIFEST} expects; {_AGAIN}."
            )
        found = _digest(path)
        if found != entry["sha256"]:
            raise FormatError(
                f"{name} in {folder} is damaged or was edited: SHA-256 {entry['sha256'][:12]}… "
                f"expected, {found[:12]}… found; {_AGAIN}."
            )
