"""tools/launch.py: ranks start together, fail together, and none outlives the others."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

LAUNCHER = Path(__file__).parents[2] / "tools" / "launch.py"
RANK = """
import os, signal, sys, time
rank, mode, folder = os.environ["RANK"], sys.argv[1], sys.argv[2]
open(f"{folder}/{rank}.pid", "w").write(str(os.getpid()))
if mode == "report":
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads")
    print(f"error of rank {rank}", file=sys.stderr)
if mode == "exit" and rank == "1":
    sys.exit(7)
if mode == "left":
    time.sleep(float(rank))
    sys.exit(1 if rank == "0" else 2)
if mode == "crash" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "asked":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    open(f"{folder}/{rank}.ready", "w").close()
if mode != "report":
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch", LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def command(mode: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", RANK, mode, str(folder)]


def alive(folder: Path) -> list[int]:
    """Process ids of ranks that still run; a zombie does not."""
    found = []
    for path in folder.glob("*.pid"):
        status = Path("/proc", path.read_text(), "stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(int(path.read_text()))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition is not met after {seconds} s"
        time.sleep(0.05)


def test_output_of_rank_0_and_errors_of_all_ranks_are_shown(
    launcher: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert launcher.launch(command("report", tmp_path), 3) == 0
    out, err = capfd.readouterr()
    assert out == f"rank 0 of 3, {threads} threads\n"
    assert sorted(err.splitlines()) == [f"error of rank {rank}" for rank in range(3)]


@pytest.mark.parametrize(("mode", "code"), [("exit", 7), ("crash", 128 + signal.SIGKILL)])
def test_failure_of_one_rank_ends_all_ranks(
    launcher: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    code: int,
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.2)
    started = time.monotonic()
    assert launcher.launch(command(mode, tmp_path), 2) == code
    assert time.monotonic() - started < 30
    assert not alive(tmp_path)
    expected = "error: rank 1 was killed by SIGKILL\n" if mode == "crash" else ""
    assert capsys.readouterr().err == expected, "a rank reports its own failure itself"


def test_exit_code_is_that_of_the_rank_that_failed_on_its_own(launcher: ModuleType, tmp_path: Path) -> None:
    assert launcher.launch(command("left", tmp_path), 2) == 2, (
        "rank 0 ended first, with 1, and was not the cause"
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_every_rank_and_no_rank_outlives_the_launcher(tmp_path: Path, number: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, LAUNCHER, "-n", "2", "--script", script, "--", "asked", tmp_path],
        env={**os.environ, "PYTHONPATH": str(LAUNCHER.parents[1])},
    )
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    process.send_signal(number)
    assert process.wait(30) == (0 if number == signal.SIGUSR1 else -signal.SIGKILL)
    wait_until(lambda: not alive(tmp_path), 5)


def test_launching_zero_ranks_is_refused(launcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "-n", "0"])
    with pytest.raises(ValueError, match="-n is 0"):
        launcher.main()


def test_no_rank_is_started_where_torch_cannot_use_the_gpus(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("torch cannot use the NVIDIA GPUs")

    monkeypatch.setattr(launcher, "check_gpus_are_usable", refuse)
    monkeypatch.setattr(launcher, "launch", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    with pytest.raises(ValueError, match="cannot use the NVIDIA GPUs"):
        launcher.main()
