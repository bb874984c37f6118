"""A local folder for a path or a hub id."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from subbit.errors import FormatError, ModelError, SubbitError
from subbit.hub.inspect import read_config

__all__ = ["is_packed_on_hub", "local_folder"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_NOT_THERE = (EntryNotFoundError, RepositoryNotFoundError, HFValidationError)


def local_folder(path: str | Path) -> Path:
    """Return `path` if it is a folder, else fetch the packed model of that hub id.

    The small config.json is fetched and judged before the weights are.

    Raises:
        ModelError: no such folder or hub id, no network, or not a packed model on the hub.
        FormatError: its config.json is damaged, or newer than this program.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise ModelError(f"'{path}' is not a folder; give a packed model's folder or a hub id.")
    try:
        with _explained(path):
            read_config(_with_config(str(path)))
            return Path(snapshot_download(str(path)))
    except EntryNotFoundError as error:
        raise ModelError(f"'{path}' on the hub has no config.json, so it is no model.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"'{path}' is neither a folder here nor a model on the hub.") from error


def is_packed_on_hub(hub_id: str) -> bool:
    """Whether a hub id is that of a packed model; only its config.json is fetched.

    False also where there is no such model: whoever loads it says so.

    Raises:
        ModelError: the hub cannot be reached, and nothing of the model was fetched earlier.
    """
    if Path(hub_id).exists() or not _HUB_ID.fullmatch(hub_id):
        return False
    try:
        with _explained(hub_id):
            folder = _with_config(hub_id)
    except _NOT_THERE:
        return False
    try:
        read_config(folder)
    except FormatError:  # a packed model all the same; loading it says what is wrong
        return True
    except ModelError:
        return False
    return True


def _with_config(hub_id: str) -> Path:
    """The folder that config.json of a hub id is fetched to."""
    return Path(hf_hub_download(hub_id, "config.json")).parent


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Say why a fetch failed, unless it is that there is no such thing on the hub."""
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"'{path}' is not a folder here, and the hub cannot be reached to look for it; "
            "check the path, or the network (and HF_HUB_OFFLINE)."
        ) from error
    except (*_NOT_THERE, SubbitError):
        raise
    except Exception as error:  # a full disk, or what the client's transport lets through
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"fetching '{path}' from the hub failed ({reason}); try again, what has arrived is kept"
        ) from error
