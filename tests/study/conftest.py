"""Texts and a tiny model on which whole studies run in seconds."""

import json

import pytest

from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def texts(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("data")
    words = "the quick brown fox jumps over a lazy dog while seven wizards box with gin and tea "
    lines = [words[i % 17 :] for i in range(80)]
    (folder / "wikitext2.test.raw").write_text("\n".join(lines))
    documents = [json.dumps({"text": line}) for line in lines]
    (folder / "c4.calibration.jsonl").write_text("\n".join(documents))
    monkeypatch.setenv("SUBBIT_DATA", str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
