"""A folder appears complete or not at all."""

import pytest
from safetensors import SafetensorError

from subbit.errors import ModelError, OutputError
from subbit.hub.atomic import save_atomically


def test_the_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"

    def build(work):
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("x")
        assert not out.exists()

    assert save_atomically(out, build) == out
    assert (out / "sub" / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def build(work):
        (work / "file").write_text("x")
        raise error("no")

    with pytest.raises(error):
        save_atomically(tmp_path / "out", build)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"out' exists already"):
        save_atomically(tmp_path / "out", lambda work: None)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    save_atomically(tmp_path / "out", lambda work: (work / "file").touch())
    assert (tmp_path / "out" / "file").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/out' cannot be written"):
        save_atomically(tmp_path / "file" / "out", lambda work: None)


def test_a_full_disk_is_named(tmp_path):
    def build(work):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"could not be written.*No space left"):
        save_atomically(tmp_path / "out", build)


def test_a_full_disk_under_safetensors_is_named(tmp_path):
    def build(work):
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(OutputError, match=r"could not be written.*No space left"):
        save_atomically(tmp_path / "out", build)
    assert not list(tmp_path.iterdir())
