"""Progress: plain lines without a terminal, one bar with one, silence when switched off."""

import io

import pytest

from subbit.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(file: io.StringIO, enabled: bool = True) -> list[str]:
    with Progress(6, enabled, file) as progress:
        progress.phase("coarse stage")
        progress.phase("blocks")
        for block in (1, 2, 3):
            for linear in ("self_attn.q_proj", "mlp.down_proj"):
                progress.update(block=block, nblocks=3, linear=linear)
                progress.update(loss=0.5 * block)
                progress.advance(1)
    return file.getvalue().splitlines()


def test_plain_lines_one_for_each_block():
    lines = drive(io.StringIO())
    assert lines[:2] == ["coarse stage", "blocks"]
    done = [line for line in lines if " done" in line]
    assert [line.split(" · ")[:3] for line in done] == [
        ["block 1/3 done", "mean loss 0.5", "33%"],
        ["block 2/3 done", "mean loss 1", "67%"],
        ["block 3/3 done", "mean loss 1.5", "100%"],
    ]
    assert all("elapsed 0:00:" in line and "peak" in line and "iB" in line for line in done)
    assert not any("\x1b" in line for line in lines)


def test_plain_lines_without_blocks_come_by_tenths():
    file = io.StringIO()
    with Progress(1000, file=file) as progress:
        progress.phase("evaluation")
        for _ in range(1000):
            progress.advance()
    lines = file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("evaluation · 50% · elapsed")


def test_an_interrupted_block_is_not_called_done():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(2, file=file) as progress:
        progress.update(block=1, nblocks=2)
        raise KeyboardInterrupt
    assert "done" not in file.getvalue()


def test_work_of_an_earlier_run_does_not_shorten_the_time_left(monkeypatch):
    now = iter([0.0, 10.0])
    monkeypatch.setattr("subbit.run.progress.time.monotonic", lambda: next(now))
    file = io.StringIO()
    with Progress(10, file=file) as progress:
        progress.update(block=9, nblocks=10)
        progress.skip(8)
        progress.advance(1)
        progress.update(block=9, nblocks=10)
    assert "90% · elapsed 0:00:10 · left 0:00:10" in file.getvalue()


def test_the_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    text = "\n".join(drive(Terminal()))
    assert "block 3/3 · mlp.down_proj · loss 1.5" in text
    assert "100%" in text and "peak" in text
    assert " done" not in text


def test_switched_off():
    assert drive(io.StringIO(), enabled=False) == []
    assert drive(Terminal(), enabled=False) == []
