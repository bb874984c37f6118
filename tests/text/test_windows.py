"""Windows of tokens: which tokens, how many, and the record of them."""

import hashlib
import json
import logging
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subbit.errors import CalibrationError, RecipeError
from subbit.text import Text, calibration_windows, check_windows, make_windows
from subbit.text import windows as windows_module
from subbit.text.windows import begins_with_bos, fingerprint
from tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text(*documents: str, joiner: str = "\n") -> Text:
    return Text("here", "calibration", list(documents), joiner, "a test")


def ids(string: str) -> list[int]:
    return TOKENIZER(string, add_special_tokens=False)["input_ids"]


def test_first_windows_are_the_joined_text_in_order():
    source = text("the first on the stairs", "another thing")
    whole = ids("the first on the stairs\nanother thing")
    windows = make_windows(source, TOKENIZER, nsamples=2, seqlen=5)
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == [whole[:5], whole[5:10]]
    assert windows.tokens_available == len(whole)
    skipped = make_windows(source, TOKENIZER, nsamples=None, seqlen=5, skip_tokens=3)
    assert skipped.tokens.flatten().tolist() == whole[3 : 3 + 5 * ((len(whole) - 3) // 5)]


def test_bos_of_windows():
    source = text("abcdefgh" * 4)
    windows = make_windows(source, TOKENIZER, nsamples=None, seqlen=5, bos="window")
    assert windows.tokens[:, 0].tolist() == [TOKENIZER.bos_token_id] * windows.nsamples
    assert windows.tokens[:, 1:].flatten().tolist() == ids("abcdefgh" * 4)[: 4 * windows.nsamples]
    assert windows.nsamples == len(ids("abcdefgh" * 4)) // 4


def test_bos_of_documents():
    bos = TOKENIZER.bos_token_id
    source = text("xy", "", "z", joiner="\n")
    windows = make_windows(source, TOKENIZER, nsamples=1, seqlen=7, bos="document")
    assert windows.tokens.tolist() == [[bos, *ids("xy\n"), *ids("\n"), bos, *ids("z")]]


def test_wikitext_has_no_documents():
    with pytest.raises(RecipeError, match="wikitext2 is one text"):
        make_windows(
            Text("wikitext2", "calibration", ["a b", "c d"], "\n", "x"),
            tiny_tokenizer(),
            nsamples=1,
            seqlen=2,
            bos="document",
        )


def test_random_windows_are_reproducible_and_leave_the_global_rng_alone():
    source = text("".join(chr(97 + (i * i) % 26) for i in range(400)))
    options = {"nsamples": 6, "seqlen": 16, "sample": "random"}
    before = torch.random.get_rng_state()
    one = make_windows(source, TOKENIZER, seed=1, **options)
    same = make_windows(source, TOKENIZER, seed=1, **options)
    other = make_windows(source, TOKENIZER, seed=2, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.tokens, same.tokens) and one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    stream = ids(source.joined)
    whole = {tuple(stream[i : i + 16]) for i in range(len(stream) - 15)}
    assert {tuple(row) for row in one.tokens.tolist()} <= whole


def test_fingerprint_is_of_bytes_and_shape():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 70000]])
    data = struct.pack("<6q", 1, 2, 3, 4, 5, 70000) + struct.pack("<2q", 2, 3)
    assert fingerprint(tokens) == hashlib.sha256(data).hexdigest()
    assert fingerprint(tokens) != fingerprint(tokens.view(3, 2))
    assert fingerprint(tokens.int()) == fingerprint(tokens)
    assert fingerprint(tokens.T.contiguous().T) == fingerprint(tokens)


def test_provenance_is_json():
    windows = make_windows(text("abcdefgh" * 9), TOKENIZER, nsamples=2, seqlen=8, skip_tokens=1)
    record = json.loads(json.dumps(windows.to_dict()))
    assert record["fingerprint"] == windows.fingerprint
    assert (record["nsamples"], record["seqlen"], record["skip_tokens"]) == (2, 8, 1)
    assert (record["source"], record["bos"], record["sample"]) == ("here", "none", "first")
    assert record["seed"] is None


def test_too_little_text_says_what_would_do():
    source = text("abcdefghijklmnopqrst")
    found = len(ids(source.joined))
    with pytest.raises(CalibrationError) as caught:
        make_windows(source, TOKENIZER, nsamples=9, seqlen=5)
    message = str(caught.value)
    assert f"{found} tokens" in message and "need 45" in message
    assert f"at most {found // 5} windows" in message
    with pytest.raises(CalibrationError, match=f"seqlen of at most {found}"):
        make_windows(source, TOKENIZER, nsamples=None, seqlen=64)
    with pytest.raises(CalibrationError, match=f"seqlen of at most {found + 1} or give"):
        make_windows(source, TOKENIZER, nsamples=None, seqlen=64, bos="window")
    with pytest.raises(CalibrationError, match=r"after the first 1000 but .* need 4; give more"):
        make_windows(source, TOKENIZER, nsamples=1, seqlen=4, skip_tokens=1000)


def test_text_that_cannot_be_tokenised_at_once_is_refused(monkeypatch):
    monkeypatch.setattr(windows_module, "_MOST_CHARACTERS", 30)
    assert make_windows(text("a" * 30), TOKENIZER, nsamples=None, seqlen=2).nsamples > 0
    with pytest.raises(CalibrationError, match=r"has 31 characters .* at most 30 characters"):
        make_windows(text("a" * 30, "b"), TOKENIZER, nsamples=1, seqlen=2)


def test_a_tokenizer_that_begins_texts_with_bos():
    class Beginning:
        bos_token_id = 1

        def __call__(self, text):
            return {"input_ids": [1, 7]}

    assert begins_with_bos(Beginning()) and not begins_with_bos(TOKENIZER)


@pytest.mark.parametrize(
    "options",
    [
        {"nsamples": 0},
        {"seqlen": 1},
        {"skip_tokens": -1},
        {"bos": "windows"},
        {"sample": "fist"},
    ],
)
def test_options_that_mean_nothing(options):
    with pytest.raises(RecipeError):
        make_windows(text("abc" * 9), TOKENIZER, **{"nsamples": 1, "seqlen": 4, **options})


def test_bos_that_the_tokenizer_has_not():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    for bos in ("window", "document"):
        with pytest.raises(RecipeError, match="no BOS"):
            make_windows(text("abc" * 9), tokenizer, nsamples=1, seqlen=4, bos=bos)


def test_long_text_is_tokenised_in_silence(caplog, capfd):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        make_windows(text("the ring on a stair " * 50), tokenizer, nsamples=1, seqlen=8)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_windows_that_do_not_fit_the_model():
    config = tiny_model("llama").config
    long = make_windows(text("abc" * 200), TOKENIZER, nsamples=1, seqlen=300)
    with pytest.raises(RecipeError, match="at most 256"):
        check_windows(long, config)
    config.vocab_size = 50
    with pytest.raises(RecipeError, match="vocabulary has 50"):
        check_windows(make_windows(text("abc" * 9), TOKENIZER, nsamples=1, seqlen=8), config)


def test_calibration_windows_of_stdlib_and_file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("the stairs " * 40, encoding="utf-8")
    own = calibration_windows(str(path), TOKENIZER, nsamples=2, seqlen=16)
    assert own.source == "own.txt" and own.tokens[0].tolist() == ids("the stairs " * 40)[:16]
    stdlib = calibration_windows("stdlib", TOKENIZER, tiny_model("llama"), nsamples=4, seqlen=32)
    assert stdlib.tokens.shape == (4, 32) and stdlib.role == "calibration"
    with pytest.raises(RecipeError, match="at most 256"):
        calibration_windows("stdlib", TOKENIZER, tiny_model("llama"), nsamples=1, seqlen=512)
    with pytest.raises(RecipeError, match="give the model"):
        calibration_windows("self", TOKENIZER)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6),
    seqlen=st.integers(2, 12),
    skip=st.integers(0, 5),
    bos=st.sampled_from(["none", "window"]),
)
def test_whole_windows_cover_the_text_once(documents, seqlen, skip, bos):
    source = text(*documents)
    usable = ids(source.joined)[skip:]
    length = seqlen - (bos == "window")
    options = {"nsamples": None, "seqlen": seqlen, "skip_tokens": skip, "bos": bos}
    if len(usable) < length:
        with pytest.raises(CalibrationError):
            make_windows(source, TOKENIZER, **options)
        return
    windows = make_windows(source, TOKENIZER, **options)
    body = windows.tokens[:, seqlen - length :].flatten().tolist()
    assert body == usable[: len(usable) // length * length]
