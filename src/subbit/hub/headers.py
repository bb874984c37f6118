"""What a folder's safetensors files hold, read from their headers alone."""

import json
import math
import operator
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subbit.errors import FormatError

__all__ = ["Header", "TensorInfo", "read_folder_headers", "read_header"]


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        file: file that holds it.
        dtype: safetensors' name of the element type, e.g. "U8", "F16".
        shape: its shape.
        nbytes: bytes of its data in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file.

    Attributes:
        path: the file.
        nbytes: bytes before the data: the length field, the JSON and its padding.
        tensors: name -> what is stored under it.
    """

    path: Path
    nbytes: int
    tensors: dict[str, TensorInfo]


def _entries(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise FormatError(f"{path} is truncated within its header ({size} bytes found).")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise FormatError(f"{path} has an unreadable header; copy it again.") from error
    return 8 + length, entries


def read_header(path: Path) -> Header:
    """Read the header of one safetensors file.

    Raises:
        FormatError: the file is truncated, or longer than its header says, or not safetensors.
    """
    size = path.stat().st_size
    nbytes, entries = _entries(path, size)
    tensors, end = {}, 0
    try:
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            shape = tuple(map(operator.index, entry["shape"]))
            tensors[name] = TensorInfo(path, entry["dtype"], shape, operator.index(stop - begin))
            end = max(end, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} has an unreadable header; copy it again.") from error
    if nbytes + end != size:
        raise FormatError(
            f"{path} has {size} bytes instead of the {nbytes + end} that its header expects; "
            "copy or download it again."
        )
    return Header(path, nbytes, tensors)


def read_folder_headers(folder: Path) -> list[Header]:
    """Read the headers of all safetensors files of a folder, in the order of their names.

    Raises:
        FormatError: there is none, or one is damaged.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FormatError(f"{folder} holds no .safetensors file; copy or download it again.")
    return [read_header(path) for path in paths]
