"""Text files of the user: plain text and JSON lines, with errors that name the line."""

import json
import re
from pathlib import Path

from subbit.errors import CalibrationError

__all__ = ["read_jsonl", "read_text"]

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, line ends as `\\n` and nothing else changed.

    Raises:
        CalibrationError: the file cannot be read, is not UTF-8 (with the line number), or holds
            nothing but white space.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"cannot read the text file '{path}': {error.strerror}; give the path of a file that "
            "exists and that you may read"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"'{path}' line {line} is not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise CalibrationError(f"the text file '{path}' is empty; give a file that holds text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(path: Path, field: str = "text") -> list[str]:
    """Return the string `field` of every line of a JSON-lines file; blank lines are skipped.

    Raises:
        CalibrationError: as `read_text`; or a line, named by its number, is no JSON object with a
            string under `field`; or all the strings are blank.
    """
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers and nesting beyond all bounds
            reason = getattr(error, "msg", error)
            raise CalibrationError(
                f"'{path}' line {number} is not JSON ({reason}); every line must be an object "
                f'such as {{"{field}": "..."}}'
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise CalibrationError(
                f"'{path}' line {number} has no string '{field}'; every line must be an object "
                f'such as {{"{field}": "..."}}'
            )
        if _SURROGATE.search(record[field]):
            raise CalibrationError(
                f"'{path}' line {number} has half a surrogate pair (\\ud800 to \\udfff) in "
                f"'{field}', which is no text; leave that line out"
            )
        documents.append(record[field])
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"every '{field}' in '{path}' is empty; give a file that holds text")
    return documents
