"""Worker processes end exactly when the run ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svd_ds.data import workers

SCRIPT = """
import multiprocessing, os, signal, sys
from itertools import islice
import torch
from svd_ds.data import workers

class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(1000)

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    items = workers.iterate_in_workers(Numbers(), 2, 1, "svd_ds.data.workers")
    assert list(islice(items, 4)) == [0, 0, 1, 1]
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
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


def test_workers_survive_signals_and_end_with_the_run(script: Path) -> None:
    process = start(script, "exit")
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, "the run exits although an iterator is not exhausted"
    pids, total = output.splitlines()
    assert int(total) == 2 * sum(range(1000)) - 2, "no item was lost to the signals"
    assert ended([int(pid) for pid in pids.split()], within=20)


def test_workers_end_when_the_run_is_killed(script: Path) -> None:
    process = start(script, "wait")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and process.stdout.readline()
    process.kill()
    process.wait(10)
    assert ended(pids, within=20)


KILLED = """
import multiprocessing, os, signal, sys
from itertools import islice
import torch
from svd_ds.data import workers

class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        for number in range(10**9):
            yield torch.full((10,), number)

if __name__ == "__main__":
    items = workers.iterate_in_workers(Numbers(), 2, 1, "svd_ds.data.workers", rank=3)
    list(islice(items, 4))
    os.kill(multiprocessing.active_children()[0].pid, int(sys.argv[1]))
    try:
        for _ in items:
            pass
    except OSError as error:
        print(error)
"""


OUT_OF_MEMORY = (
    "one of the 2 data workers of rank 3 was killed by signal 9 (SIGKILL), most likely because the machine "
    "or the job ran out of memory: reduce data.num_workers or data.prefetch"
)


@pytest.mark.slow
def test_error_of_a_killed_worker_names_its_signal(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(KILLED)
    process = start(path, str(int(signal.SIGKILL)))
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output.strip() == OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([None, -9], OUT_OF_MEMORY),
        ([-11, 0], "was killed by signal 11 (Segmentation fault): the rank's log may say more"),
        ([0, 3], "ended with exit code 3: the rank's log may say more"),
        ([None, 0], ""),
    ],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker exited"), EOFError(), ConnectionResetError()]
)
def test_torch_error_after_a_dead_worker_is_explained(
    codes: list[int | None], message: str, error: Exception
) -> None:
    class Worker:
        def __init__(self, code: int | None) -> None:
            self.exitcode = code

        def join(self, seconds: float) -> None:
            assert seconds < 1

    def items() -> Iterator[int]:
        yield 1
        raise error

    found = workers._check_workers(items(), list(map(Worker, codes)), "2 data workers of rank 3")
    assert next(found) == 1
    with pytest.raises(OSError if message else type(error), match=re.escape(message or str(error)) or None):
        next(found)
