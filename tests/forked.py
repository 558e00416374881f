"""Processes for tests that start fast: forked from a server that has imported their modules.

A rank that Python starts anew imports for six seconds, which is more than most tests compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch.distributed as dist

from tests.signals import handle_as_in_the_foreground
from tools import launch

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "svd_ds.train",
    "svd_ds.run",
    "tests.unit.training.test_killed_writer",
)


def fork_server() -> ForkServerContext:
    """Start the fork server of this process of pytest, unless a test has started it before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    forkserver.ensure_running()
    return context


class ForkedRanks:
    """Ranks of a program on this machine, forked; tools/launch.py waits for them and ends them."""

    def __init__(
        self,
        script: Path | None,
        arguments: Sequence[object],
        folder: Path,
        num_ranks: int = 2,
        **environment: str,
    ) -> None:
        """Start the ranks.

        Args:
            script: a Python file; None for the trainer.
            folder: gets what rank 0 prints and what all ranks report.
            environment: more variables of each rank.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self.folder = folder
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        server = fork_server()
        words = [str(argument) for argument in arguments]
        self._ranks = []
        for rank in range(num_ranks):
            variables = launch.rank_environment(rank, num_ranks, self._store.port) | environment
            process = server.Process(target=_run, args=(script, words, variables, str(folder)))
            process.start()
            self._ranks.append(_Rank(process))

    def is_running(self) -> bool:
        """True if no rank has ended."""
        return all(rank.poll() is None for rank in self._ranks)

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank, as the launcher does with its own."""
        for rank in self._ranks:
            os.kill(rank.pid, number)

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait until all ranks have ended; return the exit code, the output of rank 0, and all errors."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.send_signal(signal.SIGKILL)

        timer = threading.Timer(timeout, expire)
        timer.start()
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = launch.wait(self._ranks)  # type: ignore[arg-type]
        timer.cancel()
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        assert not expired.is_set(), f"the ranks did not end within {timeout} s\n{out}\n{err}"
        return subprocess.CompletedProcess([], code, out, err + errors.getvalue())


class _Rank:
    """A forked process with the interface of subprocess.Popen that the launcher uses."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self) -> None:
        self._process.join()
        self.poll()


def _run(script: Path | None, words: list[str], environment: dict[str, str], folder: str) -> None:
    """Be a rank, as tools/launch.py starts it."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(launch.PR_SET_PDEATHSIG, signal.SIGKILL)
    handle_as_in_the_foreground()
    stdout = f"{folder}/stdout" if environment["RANK"] == "0" else os.devnull
    for number, path in ((1, stdout), (2, f"{folder}/stderr")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if script is None:
        from svd_ds.train import main

        sys.argv = ["train", *words]
        main()
    else:
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
