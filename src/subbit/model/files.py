"""Find the files of a model and look them over before anything is loaded."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from subbit.errors import ModelError

__all__ = ["check_weights", "fetch", "looks_like_hub_id", "read_json"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]


def looks_like_hub_id(source: str) -> bool:
    """Say whether `source` may name a model on the hub (`name` or `owner/name`), not a path."""
    weights = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
    plausible = re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", source)
    return bool(plausible) and not source.endswith(weights)


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """Download what a hub model needs (or find it in the local cache) and return its folder.

    Raises:
        ModelError: the hub cannot be reached, or has no such model, or keeps it closed.
    """
    folder = _snapshot(hub_id, revision, _SMALL)
    if not (folder / "config.json").is_file():
        return folder
    for index, single in ((_INDEX, _SINGLE), (_PICKLED_INDEX, _PICKLED)):
        shards = sorted(set(_weight_map(folder / index).values())) or [single]
        folder = _snapshot(hub_id, revision, shards)
        if any((folder / shard).is_file() for shard in shards):
            break
    return folder


def check_weights(folder: Path) -> None:
    """Check that the weight files of a local model are all there and whole.

    Only headers are read. Pickled `.bin` weights cannot be checked without loading them.

    Raises:
        ModelError: names the file that is absent, truncated or damaged.
    """
    if (folder / _SINGLE).is_file():
        _check_shard(folder / _SINGLE, set())
        return
    weight_map = _weight_map(folder / _INDEX)
    if not weight_map:
        if any((folder / name).is_file() for name in (_PICKLED, _PICKLED_INDEX)):
            return
        raise ModelError(
            f"'{folder}' has no weights: neither {_SINGLE} nor {_INDEX} is there; "
            "was the download or the copy complete?"
        )
    for shard in sorted(set(weight_map.values())):
        names = {name for name, file in weight_map.items() if file == shard}
        _check_shard(folder / shard, names)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' holds no JSON object; fetch it again")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> shard file, empty where there is no index."""
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"'{index}' has no weight_map that names the shards; fetch it again")
    return weight_map


def _check_shard(path: Path, names: set[str]) -> None:
    """Check that a safetensors file is whole and holds the tensors called `names`."""
    if not path.is_file():
        raise ModelError(f"the weight file '{path}' is missing; fetch the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            raise ModelError(
                f"'{path}' is a Git LFS pointer, not weights; run `git lfs pull` in its folder"
            )
    try:
        with safe_open(path, framework="pt") as shard:  # compares the header to the file's size
            absent = names - set(shard.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"the weight file '{path}' ({size} bytes) is truncated or damaged: {error}; "
            "fetch it again"
        ) from error
    if absent:
        raise ModelError(
            f"the weight file '{path}' lacks {len(absent)} tensors that its index lists, among "
            f"them {min(absent)}; fetch the model again"
        )


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    # top level only: subfolders hold other formats of the same weights
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except GatedRepoError as error:
        raise ModelError(
            f"the hub keeps '{hub_id}' closed: ask for access on its page and log in with "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"'{hub_id}' on the hub has no revision '{revision}'") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"'{hub_id}' is neither a local folder nor a model on the hub; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"'{hub_id}' is no local folder, and the hub could not be reached to download it "
            "(no network, or HF_HUB_OFFLINE is set); a local model folder or .gguf file works "
            "without network"
        ) from error
    except Exception as error:  # the client lets its transport's own errors through
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"downloading '{hub_id}' from the hub failed ({reason}); try again, what has arrived "
            "is kept"
        ) from error
    return Path(folder)
