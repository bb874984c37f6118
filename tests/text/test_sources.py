"""Where text comes from: files, the data folder, the hub's absence, Python's own topics."""

import json
import os

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subbit.errors import CalibrationError, RecipeError
from subbit.text.files import read_jsonl, read_text
from subbit.text.sources import load_text


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a few lines of every named source; the hub is out of reach."""

    def no_hub(*args, **kwargs):
        raise ConnectionError("no route to the hub\nsecond line")

    rows = {"c4.calibration.jsonl": ["one", "two\nlines"], "c4.validation.jsonl": ["three"]}
    for name, texts in rows.items():
        lines = [json.dumps({"text": text, "url": "x"}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "wikitext2.valid.raw").write_text(" \n = A = \n \n a b . \n", encoding="utf-8")
    (tmp_path / "wikitext2.test.raw").write_bytes(b" = B = \r\n c \xe2\x80\x93 d . \r\n")
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n but <unk> \n", encoding="utf-8")
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    return tmp_path


def test_named_sources_of_the_data_folder(data):
    c4 = load_text("c4")
    assert c4.documents == ["one", "two\nlines"]
    assert c4.joined == "one\ntwo\nlines"
    assert (c4.name, c4.role, c4.origin) == (
        "c4",
        "calibration",
        "SUBBIT_DATA/c4.calibration.jsonl",
    )
    assert load_text("c4", "evaluation").joined == "three"
    assert load_text("wikitext2").joined == " \n = A = \n \n a b . \n"
    assert load_text("wikitext2", "evaluation").joined == " = B = \n c – d . \n"
    ptb = load_text("ptb", "evaluation")
    assert ptb.documents == ["no it was n't", "but <unk>"]
    assert ptb.joined == "no it was n't but <unk>"


def test_no_hub_is_one_clear_sentence(data):
    (data / "c4.validation.jsonl").unlink()
    for name, role in (("ptb", "calibration"), ("c4", "evaluation")):
        with pytest.raises(CalibrationError) as caught:
            load_text(name, role)
        message = str(caught.value)
        assert name in message and "hub cannot be reached" in message
        assert "SUBBIT_DATA" in message and "stdlib" in message and ".jsonl" in message
        assert "no route to the hub" in message and "\n" not in message


def test_hub_rows_and_their_joiners(monkeypatch):
    calls = []

    def fake(repo, *, split, streaming, **arguments):
        calls.append((repo, split, streaming, arguments))
        field = "sentence" if "ptb" in repo else "text"
        return [{field: text} for text in ("", " = A = \n", "b")]

    monkeypatch.delenv("SUBBIT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_text("wikitext2", "evaluation").joined == "\n\n = A = \n\n\nb"
    assert load_text("ptb").joined == "  = A = \n b"
    assert load_text("c4").joined == "\n = A = \n\nb"
    assert [(repo, split, streaming) for repo, split, streaming, _ in calls] == [
        ("Salesforce/wikitext", "test", False),
        ("ptb-text-only/ptb_text_only", "train", False),
        ("allenai/c4", "train", True),
    ]
    assert calls[0][3] == {"name": "wikitext-2-raw-v1"}
    assert calls[1][3]["revision"] == "refs/convert/parquet"


def test_hub_takes_only_as_many_rows_as_it_says(monkeypatch):
    def endless(*args, **kwargs):
        while True:
            yield {"text": "again"}

    monkeypatch.delenv("SUBBIT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", endless)
    assert len(load_text("c4", "evaluation").documents) == 1100


def test_empty_hub_split(monkeypatch):
    monkeypatch.delenv("SUBBIT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": " "}])
    with pytest.raises(CalibrationError, match="empty"):
        load_text("wikitext2")


def test_data_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(CalibrationError, match="no folder"):
        load_text("c4")


def test_files_have_the_same_text_in_both_roles(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_bytes("\ufeffa\r\nb\u2028c\n".encode())
    lines.write_text('{"text": "x"}\n\n{"text": "y"}\n', encoding="utf-8")
    for role in ("calibration", "evaluation"):
        assert load_text(plain, role).joined == "a\nb\u2028c\n"
        assert load_text(str(lines), role).documents == ["x", "y"]
    assert load_text(plain).origin == "file a.txt"


def test_stdlib_roles_share_no_paragraph_and_suffice():
    parts = {role: load_text("stdlib", role) for role in ("calibration", "evaluation")}

    def paragraphs(text):
        split = (p for document in text.documents for p in document.split("\n\n"))
        return [" ".join(p.split()) for p in split]

    calibration, evaluation = map(paragraphs, parts.values())
    assert len(set(calibration)) == len(calibration)
    assert not set(calibration) & set(evaluation)
    # 4 characters a token and more: 32 windows of 2048, and 15 000 tokens held out
    assert len(parts["calibration"].joined) > 4 * 32 * 2048
    assert len(parts["evaluation"].joined) > 4 * 15_000
    assert parts["calibration"].origin.startswith("pydoc_data.topics of Python 3.")
    assert load_text("stdlib") == parts["calibration"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "line 3 is not JSON"),
        (b'["a"]', "line 3 has no string 'text'"),
        (b'{"txt": "a"}', "line 3 has no string 'text'"),
        (b'{"text": null}', "line 3 has no string 'text'"),
        (b'{"text": ' + b"[" * 100_000, "line 3 is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 3 is not JSON"),
        (rb'{"text": "a\ud800"}', "line 3 has half a surrogate pair"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8 .byte 0xff"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=reason) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)


def test_unusable_files(tmp_path):
    empty, blank = tmp_path / "empty.txt", tmp_path / "blank.jsonl"
    empty.write_text(" \n\n", encoding="utf-8")
    blank.write_text('{"text": " "}\n', encoding="utf-8")
    for path in (empty, blank):
        with pytest.raises(CalibrationError, match="empty"):
            load_text(path)
    with pytest.raises(CalibrationError, match=r"missing\.txt"):
        load_text(tmp_path / "missing.txt")
    with pytest.raises(CalibrationError, match="cannot read"):
        folder = tmp_path / "folder.txt"
        folder.mkdir()
        load_text(folder)


def test_unknown_names():
    with pytest.raises(RecipeError, match="did you mean 'wikitext2'"):
        load_text("wikitext")
    with pytest.raises(RecipeError, match="did you mean 'evaluation'"):
        load_text("stdlib", "evaluate")
    with pytest.raises(RecipeError, match="not a text file"):
        load_text(__file__)
    with pytest.raises(CalibrationError, match="sampled from the model"):
        load_text("self")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8")), min_size=1))
def test_json_lines_round_trip(tmp_path_factory, documents):
    documents = [*documents, "word"]
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_bytes("\n".join(lines).encode())
    assert read_jsonl(path) == documents


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8")).filter(str.strip))
def test_text_is_unchanged_but_for_line_ends(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes(text.encode())
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if expected.strip():
        assert read_text(path) == expected


@pytest.mark.skipif(not os.environ.get("SUBBIT_DATA"), reason="SUBBIT_DATA is not set")
def test_real_data_folder():
    for name, role in (("c4", "calibration"), ("c4", "evaluation"), ("wikitext2", "evaluation")):
        text = load_text(name, role)
        assert text.origin.startswith("SUBBIT_DATA/")
        assert len(text.joined) > 500_000
    ours, theirs = (set(load_text("c4", role).documents) for role in ("calibration", "evaluation"))
    assert not ours & theirs
