"""SOURCE -> documents: where calibration and evaluation text comes from.

A named source is looked up in the folder `SUBBIT_DATA` first, then on the hub. Its two roles,
"calibration" and "evaluation", share no document. How documents are joined is part of the
evaluation protocol (a perplexity changes with it) and is recorded with the windows:

- `wikitext2` of the hub: rows joined by a blank line, as in GPTQ and the papers after it; a raw
  file in `SUBBIT_DATA` is taken as it is, line by line. The two give different perplexities.
- `ptb`: sentences joined by a space.
- `c4`: documents joined by a newline.
- `stdlib`: topics joined by a blank line.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from subbit.errors import CalibrationError, RecipeError, nearest
from subbit.text.files import read_jsonl, read_text
from subbit.text.online import HubText
from subbit.text.stdlib import topic_documents, topic_origin

__all__ = ["NAMED_SOURCES", "ROLES", "SELF", "Text", "load_text"]

ROLES = ("calibration", "evaluation")
SELF = "self"
DATA_FOLDER = "SUBBIT_DATA"


@dataclass(frozen=True)
class Text:
    """Documents of one source in one role.

    Attributes:
        name: the source as the user named it (of a file its name without the folder).
        role: "calibration" or "evaluation".
        documents: the documents in order, at least one that is not blank.
        joiner: what stands between two documents when they are tokenised as one text.
        origin: where the documents were found, for the record.
    """

    name: str
    role: str
    documents: list[str]
    joiner: str
    origin: str

    @property
    def joined(self) -> str:
        """All documents as one text."""
        return self.joiner.join(self.documents)


@dataclass(frozen=True)
class _Named:
    """A named source: per role a file of `SUBBIT_DATA` (or None) and a split of the hub."""

    files: dict[str, str | None]
    hub: dict[str, HubText]
    joiner: str


_C4_SHARD = "en/c4-{}.json.gz"
_PARQUET = "refs/convert/parquet"  # the ptb repository itself is a script, no longer supported


def _wikitext(split: str) -> HubText:
    return HubText("Salesforce/wikitext", split, "text", {"name": "wikitext-2-raw-v1"})


def _ptb(split: str) -> HubText:
    files = {split: f"penn_treebank/{split}/0000.parquet"}
    arguments = {"revision": _PARQUET, "data_files": files}
    return HubText("ptb-text-only/ptb_text_only", split, "sentence", arguments)


def _c4(split: str, shard: str, limit: int) -> HubText:
    arguments = {"data_files": {split: _C4_SHARD.format(shard)}}
    return HubText("allenai/c4", split, "text", arguments, limit)


_NAMED = {
    "c4": _Named(
        {"calibration": "c4.calibration.jsonl", "evaluation": "c4.validation.jsonl"},
        {
            # about 1 000 000 tokens: nearly 500 windows of 2048
            "calibration": _c4("train", "train.00000-of-01024", 2000),
            "evaluation": _c4("validation", "validation.00000-of-00008", 1100),
        },
        "\n",
    ),
    "wikitext2": _Named(
        {"calibration": "wikitext2.valid.raw", "evaluation": "wikitext2.test.raw"},
        {"calibration": _wikitext("train"), "evaluation": _wikitext("test")},
        "\n\n",
    ),
    "ptb": _Named(
        {"calibration": None, "evaluation": "ptb.test.txt"},
        {"calibration": _ptb("train"), "evaluation": _ptb("test")},
        " ",
    ),
}
NAMED_SOURCES = (*_NAMED, "stdlib", SELF)
_SUFFIXES = (".txt", ".raw", ".jsonl")


def load_text(source: str | os.PathLike[str], role: str = "calibration") -> Text:
    """Return the documents of `source` in `role`.

    Args:
        source: one of `NAMED_SOURCES`, or the path of a `.txt`, `.raw` or `.jsonl` file (one JSON
            object with a string `text` a line). A file gives the same documents in both roles.
        role: "calibration" or "evaluation".

    Raises:
        RecipeError: no such role or source, or a file of another kind.
        CalibrationError: the text is missing, empty, unreadable, or the hub cannot be reached.
    """
    if role not in ROLES:
        raise RecipeError(f"no text role '{role}'{nearest(role, ROLES)}")
    name = os.fspath(source)
    if name == SELF:
        raise CalibrationError(
            "the source 'self' is sampled from the model and holds no stored text; use it for "
            "calibration, and another source here"
        )
    if name == "stdlib":
        return Text(name, role, topic_documents(role), "\n\n", topic_origin())
    if name in _NAMED:
        return _load_named(name, role)
    return _load_file(Path(name), role)


def _load_named(name: str, role: str) -> Text:
    named = _NAMED[name]
    path = _in_data_folder(named.files[role])
    if path is None:
        hub = named.hub[role]
        return Text(name, role, _with_words(hub, name), named.joiner, hub.origin)
    origin = f"{DATA_FOLDER}/{path.name}"
    if path.suffix == ".jsonl":
        return Text(name, role, read_jsonl(path), named.joiner, origin)
    if name == "ptb":
        sentences = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        return Text(name, role, sentences, named.joiner, origin)
    return Text(name, role, [read_text(path)], "\n", origin)


def _with_words(hub: HubText, name: str) -> list[str]:
    documents = hub.documents(name)
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"the {hub.origin} is empty; give a .txt or .jsonl file instead")
    return documents


def _in_data_folder(file: str | None) -> Path | None:
    """Return `file` in the folder `SUBBIT_DATA`; None when either is not there."""
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise CalibrationError(
            f"{DATA_FOLDER} is '{folder}', which is no folder; set it to a folder with text files, "
            "or unset it to use the hub"
        )
    path = Path(folder, file) if file else None
    return path if path is not None and path.exists() else None


def _load_file(path: Path, role: str) -> Text:
    if path.suffix not in _SUFFIXES:
        if path.exists():
            raise RecipeError(f"'{path}' is not a text file; known: {', '.join(_SUFFIXES)}")
        raise RecipeError(
            f"no text source '{path}'{nearest(str(path), NAMED_SOURCES)}, or the path of a file "
            f"({', '.join(_SUFFIXES)})"
        )
    documents = read_jsonl(path) if path.suffix == ".jsonl" else [read_text(path)]
    return Text(path.name, role, documents, "\n", f"file {path.name}")
