"""Worker processes live exactly as long as the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, os, signal, sys
from itertools import islice
import torch
from svd_ds.data import workers

class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(1000)

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    items = workers.start(Numbers(), 2, 1, "svd_ds.data.workers")
    assert list(islice(items, 4)) == [0, 0, 1, 1]
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.killpg(os.getpgid(0), number)
    print(sum(islice(items, 1996)), flush=True)
    if sys.argv[1] == "wait":
        signal.pause()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), mode],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > end:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def test_signals_to_the_job_step_leave_them_alive_and_the_exit_does_not(script: Path) -> None:
    process = start(script, "exit")
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, "the run ended by itself though an iterator was still alive"
    pids, total = output.splitlines()
    assert int(total) == 2 * sum(range(1000)) - 2, "nothing was lost to the signals"
    assert ended([int(pid) for pid in pids.split()], within=20)


def test_they_end_when_the_run_is_killed(script: Path) -> None:
    process = start(script, "wait")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and process.stdout.readline()
    process.kill()
    process.wait(10)
    assert ended(pids, within=20)
