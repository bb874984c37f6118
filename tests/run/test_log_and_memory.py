"""The log of a run, and what counts as peak memory."""

import json
import subprocess
import sys

import pytest

from subbit.run.log import LinearLog
from subbit.run.memory import format_bytes, peak_cuda_bytes, peak_rss_bytes


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with LinearLog(path) as log:
        log.write({"name": "q_proj", "loss": 0.25, "shape": (4, 8)})
        assert read(path) == [{"name": "q_proj", "loss": 0.25, "shape": [4, 8]}]
        log.write({"name": "k_proj", "loss": float("nan"), "more": {"x": [float("inf")]}})
    assert read(path)[1] == {"name": "k_proj", "loss": None, "more": {"x": [None]}}


def test_a_resumed_log_holds_committed_lines_only(tmp_path):
    path = tmp_path / "log.jsonl"
    with LinearLog(path) as log:
        for block in (0, 1):
            log.write({"block": block})
    with LinearLog(path, keep=[{"block": 0}]) as log:
        log.write({"block": 1, "again": True})
    assert read(path) == [{"block": 0}, {"block": 1, "again": True}]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_does_not_report_its_parents_peak():
    block = bytearray(256 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    code = "from subbit.run.memory import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.check_output([sys.executable, "-c", code]))
    assert child < 128 << 20 < peak_rss_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /proc")
def test_the_peak_starts_anew():
    code = (
        "from subbit.run.memory import peak_rss_bytes, reset_peak_rss; block = b'x' * (200 << 20); "
        "del block; print(peak_rss_bytes()); reset_peak_rss(); print(peak_rss_bytes())"
    )
    before, after = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert after < 100 << 20 < before


def test_no_gpu_memory_without_torch():
    code = (
        "import sys; from subbit.run.memory import peak_cuda_bytes; "
        "print(peak_cuda_bytes(), 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0 False\n"
    assert peak_cuda_bytes() >= 0


def test_format_bytes():
    assert [format_bytes(n) for n in (5, 2048, 3 << 20, 3 << 29)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "1.5 GiB",
    ]
