"""Communicators are destroyed where all ranks leave together; a rank that fails alone leaves at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svd_ds.parallel import env as environment
from svd_ds.parallel import process_group as module
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.env import Env
from svd_ds.parallel.process_group import leave_on_error, process_group

LEAVING = """
import atexit, multiprocessing, sys, time
from svd_ds.parallel.process_group import leave

if __name__ == "__main__":
    atexit.register(lambda: time.sleep(1000))
    child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(1000,))
    child.start()
    print(child.pid)
    leave(7)
"""


def env(world: int) -> Env:
    return Env(0, world, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that a rank makes."""
    found: list[str] = []
    monkeypatch.setattr(environment, "init", lambda *_: found.append("init"))
    monkeypatch.setattr(environment, "shutdown", lambda: found.append("shutdown"))
    monkeypatch.setattr(module, "leave", lambda code: found.append(f"leave {code}"))
    return found


@pytest.mark.parametrize(
    ("error", "world", "destroyed"),
    [
        (None, 2, True),
        (SharedError("data.path is nowhere"), 2, True),
        (KeyError("bug"), 2, False),
        (ValueError("clip 7 cannot be read"), 2, False),
        (KeyboardInterrupt(), 2, False),
        (KeyError("bug"), 1, True),
    ],
)
def test_communicators_are_destroyed_where_all_ranks_leave_together(
    calls: list[str], error: BaseException | None, world: int, destroyed: bool
) -> None:
    def run() -> None:
        with process_group(env(world)):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)) as raised:
            run()
        assert raised.value is error
    assert calls == (["init", "shutdown"] if destroyed else ["init"])


def test_error_of_the_block_is_not_replaced_by_one_of_the_shutdown(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(environment, "shutdown", fail)
    with pytest.raises(KeyError), process_group(env(1)):
        raise KeyError("bug")
    with pytest.raises(RuntimeError), process_group(env(1)):
        pass


def test_program_without_a_session_shows_its_traceback_and_leaves(
    calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with leave_on_error(env(2)), process_group(env(2)):
        raise KeyError("bug")
    assert calls == ["init", "leave 1"]
    assert "KeyError: 'bug'" in capsys.readouterr().err
    for error, world in ((SharedError("data.path is nowhere"), 2), (KeyError("bug"), 1)):
        with pytest.raises(type(error)), leave_on_error(env(world)):
            raise error
    assert "leave" not in calls


def test_process_leaves_without_its_exit_handlers_and_takes_its_workers_with_it(tmp_path: Path) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 7, ended.stderr
    stat = Path("/proc", ended.stdout.strip(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", "output is flushed"
