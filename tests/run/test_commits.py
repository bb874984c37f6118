"""Commits and resume: finished blocks stay, damaged ones are redone, other settings are refused."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from subbit.errors import CheckpointError, OutputError
from subbit.run import guards
from subbit.run.commits import Workdir, check_output

SETTINGS = {"recipe": {"nm": "6:8", "options": {"tau": 10}}, "model": "abc", "seeds": [0, 1]}


def tensors(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        "codes": torch.randint(0, 9, (8, 16), dtype=torch.uint8, generator=generator),
        "levels": torch.randn(8, 3, generator=generator).half(),
    }


def commit(work: Workdir, count: int) -> None:
    for index in range(work.committed, count):
        work.commit(index, tensors(index), {"log": [{"loss": index / 7}], "pair": (1, 2)})


def write_model(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "model.bin").write_bytes(b"model")


def test_resume_finds_every_committed_block(tmp_path):
    out = tmp_path / "model"
    with Workdir.open(out, SETTINGS) as work:
        assert work.committed == 0
        work.store("coarse", {"n": (7, 6, 5)})
        commit(work, 3)
    with Workdir.open(out, SETTINGS, "required") as again:
        assert again.committed == 3
        assert again.fetch("coarse") == {"n": [7, 6, 5]}
        assert again.fetch("nothing") is None
        for index in range(3):
            loaded, meta = again.load(index)
            assert meta == {"log": [{"loss": index / 7}], "pair": [1, 2]}
            for name, tensor in tensors(index).items():
                assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        with pytest.raises(CheckpointError, match="block 3"):
            again.load(3)
    assert not out.exists()


def test_views_of_one_storage_are_kept_apart(tmp_path):
    both = torch.arange(12.0).view(3, 4)
    with Workdir.open(tmp_path / "m", {}) as work:
        work.commit(0, {"left": both[:, :2], "right": both[:, 2:], "head": both[0]}, {})
        loaded, _ = work.load(0)
    assert torch.equal(loaded["left"], both[:, :2]) and torch.equal(loaded["right"], both[:, 2:])
    assert torch.equal(loaded["head"], both[0])


def test_the_next_block_only(tmp_path):
    with Workdir.open(tmp_path / "m", {}) as work, pytest.raises(ValueError, match="block 1"):
        work.commit(1, tensors(1), {})


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_meta(path: Path) -> None:
    note = json.loads(path.with_suffix(".json").read_text())
    note["meta"]["log"] = []
    path.with_suffix(".json").write_text(json.dumps(note))


DAMAGES = {
    "flipped byte": flip_byte,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no block file": lambda path: path.unlink(),
    "no json": lambda path: path.with_suffix(".json").unlink(),
    "empty json": lambda path: path.with_suffix(".json").write_text(""),
    "json of another kind": lambda path: path.with_suffix(".json").write_text("[]"),
    "changed meta": cut_meta,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_block_and_all_after_it_are_redone(tmp_path, damage):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        commit(work, 4)
        damage(work.path / "block-0001.safetensors")
    with Workdir.open(out, SETTINGS) as again:
        assert again.committed == 1
        names = {path.name for path in again.path.glob("block-*")}
        assert names == {"block-0000.safetensors", "block-0000.json"}
        commit(again, 4)
    with Workdir.open(out, SETTINGS) as whole:
        assert whole.committed == 4
        assert torch.equal(whole.load(3)[0]["codes"], tensors(3)["codes"])


def test_damaged_state_counts_as_none(tmp_path):
    with Workdir.open(tmp_path / "m", {}) as work:
        work.store("coarse", [1, 2])
        path = work.path / "state-coarse.json"
        path.write_text(path.read_text().replace("2", "3"))
        assert work.fetch("coarse") is None


def test_tensors_that_are_kept_take_the_place_of_those_before(tmp_path):
    with Workdir.open(tmp_path / "m", {}) as work:
        assert work.fetch_tensors("steps") is None
        for step in range(3):
            work.store_tensors("steps", tensors(step), step)
        assert len(list(work.path.glob("state-steps*.safetensors"))) == 1
    with Workdir.open(tmp_path / "m", {}) as work:
        found, step = work.fetch_tensors("steps")
        assert step == 2 and torch.equal(found["codes"], tensors(2)["codes"])
        (file,) = work.path.glob("state-steps*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert work.fetch_tensors("steps") is None
        file.unlink()
        assert work.fetch_tensors("steps") is None
        work.store_tensors("steps", tensors(3), 3)
        assert work.fetch_tensors("steps")[1] == 3


def test_other_settings_are_refused_and_named(tmp_path):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        commit(work, 1)
    other = {"recipe": {"nm": "5:8", "options": {}}, "model": "abc", "seeds": [0, 1], "torch": "3"}
    with pytest.raises(CheckpointError) as caught:
        Workdir.open(out, other)
    message = str(caught.value)
    assert "recipe.nm was 6:8 and is 5:8" in message
    assert "recipe.options.tau was 10 and is absent" in message
    assert "torch was absent and is 3" in message
    assert "model" not in message.split("other settings:")[1].split("pass the old")[0]
    assert "--resume never" in message and "\n" not in message
    with Workdir.open(out, SETTINGS) as work:
        assert work.committed == 1
    with Workdir.open(out, other, "never") as work:
        assert work.committed == 0
        assert not list(work.path.glob("block-*"))
    with Workdir.open(out, other, "required"):
        pass


def test_a_damaged_run_file_is_not_guessed_at(tmp_path):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        (work.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Workdir.open(out, SETTINGS)
    with Workdir.open(out, SETTINGS, "never") as work:
        assert work.committed == 0


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there exists already"):
        Workdir.open(tmp_path / "there", {})
    with pytest.raises(OutputError, match=r"nowhere .* does not exist"):
        Workdir.open(tmp_path / "nowhere" / "m", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "file" / "m")
    with pytest.raises(CheckpointError, match="no unfinished run"):
        Workdir.open(tmp_path / "m", {}, "required")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "m")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_somebody_elses_folder_is_left_alone(tmp_path, resume):
    mine = tmp_path / "m.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"m\.partial is in the way"):
        Workdir.open(tmp_path / "m", {}, resume)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_publish_moves_the_whole_folder_and_cleans_up(tmp_path):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        commit(work, 2)
        work.publish(write_model)
    assert (out / "sub" / "model.bin").read_bytes() == b"model"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failing_build_leaves_no_output_and_keeps_the_blocks(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("power cut")

    out = tmp_path / "m"
    with pytest.raises(RuntimeError), Workdir.open(out, SETTINGS) as work:
        commit(work, 2)
        work.publish(fail)
    assert not out.exists()
    with Workdir.open(out, SETTINGS) as work:
        assert work.committed == 2
        work.publish(write_model)
    assert [path.name for path in out.iterdir()] == ["sub"]


def test_publish_does_not_overwrite(tmp_path):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        out.mkdir()
        with pytest.raises(OutputError, match="came into being"):
            work.publish(write_model)
    assert not list(out.iterdir())


def test_a_finished_run_that_was_cut_off_while_cleaning_up(tmp_path, monkeypatch):
    out = tmp_path / "m"
    with Workdir.open(out, SETTINGS) as work:
        monkeypatch.setattr(work, "discard", lambda: None)
        work.publish(write_model)
    with pytest.raises(OutputError, match=r"finished model, only .*m\.partial is left to be rem"):
        check_output(out)


def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(guards.fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="No locks available"):
        Workdir.open(tmp_path / "m", SETTINGS)


def test_discard(tmp_path):
    with Workdir.open(tmp_path / "m", SETTINGS) as work:
        commit(work, 1)
        work.discard()
    assert not list(tmp_path.iterdir())


def run_script(body: str, *args: str, **options: object) -> subprocess.Popen:
    head = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_commits import *
"""
    script = head + textwrap.dedent(body)
    command = [sys.executable, "-c", script, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


HOLD = """
with Workdir.open(Path(sys.argv[1]), SETTINGS) as work:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_and_a_dead_one(tmp_path):
    out = tmp_path / "m"
    other = run_script(HOLD, str(out), stdin=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "held\n"
        for resume in ("auto", "never"):
            with pytest.raises(CheckpointError, match="another process"):
                Workdir.open(out, SETTINGS, resume)
    finally:
        other.kill()
        other.wait()
    with Workdir.open(out, SETTINGS, "required"):
        pass


COMMIT_AND_DIE = """
import subbit.run.atomic as atomic

out, steps = Path(sys.argv[1]), int(sys.argv[2])
fsync, replace = os.fsync, os.replace


def counting(function):
    def call(*args):
        global steps
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps -= 1
        return function(*args)

    return call


atomic.os.fsync, atomic.os.replace = counting(fsync), counting(replace)
with Workdir.open(out, SETTINGS) as work:
    print("opened", work.committed, flush=True)
    commit(work, 3)
    work.publish(write_model)
"""


def test_kill_9_at_every_step_of_the_commits(tmp_path):
    """Each attempt gets a few syncs and renames further; none goes back, one finishes."""
    out = tmp_path / "m"
    before, deaths = 0, 0
    for attempt in range(20):
        process = run_script(COMMIT_AND_DIE, str(out), str(3 * attempt + 1))
        said = process.communicate()[0].split()
        if said:
            assert int(said[1]) >= before
            before = int(said[1])
        if out.exists():
            break
        assert process.returncode == -signal.SIGKILL
        deaths += 1
    assert deaths >= 4
    assert (out / "sub" / "model.bin").read_bytes() == b"model"


def test_blocks_are_the_same_bytes_after_a_kill(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Workdir.open(whole, SETTINGS) as work:
        commit(work, 3)
    process = run_script(COMMIT_AND_DIE, str(killed), "14")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with Workdir.open(killed, SETTINGS, "required") as work:
        assert 0 < work.committed < 3
        commit(work, 3)
    for index in range(3):
        name = f"block-{index:04d}.safetensors"
        one, two = tmp_path / "whole.partial" / name, tmp_path / "killed.partial" / name
        assert one.read_bytes() == two.read_bytes()


FULL_DISK = """
with Workdir.open(Path(sys.argv[1]), SETTINGS) as work:
    commit(work, 1)
    try:
        work.commit(1, {"big": torch.zeros(1_000_000)}, {})
    except OutputError as error:
        print(error)
"""


def test_no_room_on_the_disk_is_an_output_error(tmp_path):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = run_script(FULL_DISK, str(tmp_path / "m"), preexec_fn=limit)
    said = process.communicate()[0]
    assert process.returncode == 0 and "cannot write" in said and "block-0001" in said
    with Workdir.open(tmp_path / "m", SETTINGS, "required") as work:
        assert work.committed == 1
        assert not list(work.path.glob(".tmp-*"))
