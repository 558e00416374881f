"""What a job asks of Slurm from its batch host: steps, and to be started again. By scontrol and srun alone.

A job that still runs may ask for another life; one that was cancelled, or that Slurm itself takes away, is
Slurm's to end. It is asked to end by signals, which must not be lost while a process is being started.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass

CONTROLLER_AWAY = ("Unable to contact slurm controller", "Socket timed out")
AWAY_WAITS_S = (5.0, 30.0, 120.0)
PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGUSR1, signal.SIGTERM)
"""The signals by which a job is asked to end."""
libc = ctypes.CDLL(None)


def hold_signals() -> None:
    """Let the ending signals wait, here and in processes that are started meanwhile, until each is ready to
    answer them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def release_signals() -> None:
    """Answer the ending signals, those first that have been waiting."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@dataclass(frozen=True)
class Job:
    """One allocation, seen from its batch host."""

    id: str
    nodes: tuple[str, ...]
    cpus: int
    """Of a task."""
    gpus: int
    """Of a node."""
    max_restarts: int
    """At most, of a run from one of its steps."""
    preflight: bool
    """Whether the nodes are tried before a start."""

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """The options by which slurm/lib.sh tells of the allocation, and a site of its wishes."""
        add = parser.add_argument
        add("--job", required=True, type=int, metavar="ID", help="the job's id")
        add("--nodes", required=True, metavar="NAMES", help="its nodes, with commas between")
        add("--cpus", type=int, default=1, metavar="N", help="of a task; default: %(default)s")
        add("--gpus", type=int, default=0, metavar="N", help="of a node; default: %(default)s")
        add(
            "--max-restarts",
            type=int,
            default=3,
            metavar="N",
            help="at most, from one step; default: %(default)s",
        )
        add("--no-preflight", action="store_true", help="do not try the nodes before a start")

    @staticmethod
    def of(options: Namespace) -> Job:
        nodes = tuple(options.nodes.split(","))
        numbers = options.cpus, options.gpus, options.max_restarts
        return Job(str(options.job), nodes, *numbers, preflight=not options.no_preflight)

    def options(self) -> list[str]:
        """Words that `of` reads as this job."""
        numbers = {"--cpus": self.cpus, "--gpus": self.gpus, "--max-restarts": self.max_restarts}
        words = [word for name, number in numbers.items() for word in (name, str(number))]
        switches = [] if self.preflight else ["--no-preflight"]
        return ["--job", self.id, "--nodes", ",".join(self.nodes), *words, *switches]

    def step(self, command: Sequence[str], *options: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start `command` as the tasks of a job step, with `variables` in their environment.

        One failed task ends the step, so nobody waits in a collective for ever; the end of this process ends
        it too.
        """
        return subprocess.Popen(
            ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus}", *options, *command],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            # Signals reach the tasks through us alone.
            process_group=0,
            preexec_fn=_end_with_parent,
        )

    def is_running(self) -> bool:
        shown = _scontrol("show", "job", "-o", self.id)
        state = re.search(r"JobState=(\w+)", shown)
        return state is not None and state[1] == "RUNNING"

    def requeue(self, without: Sequence[str] = ()) -> None:
        """End this life and queue the job again, not on the nodes `without`. Slurm then ends this process."""
        if without:
            excluded = ",".join([*self._excluded(), *without])
            # Only a pending job's nodes can be chosen, and a held one does not start in between.
            _scontrol("requeuehold", self.id)
            _scontrol("update", f"JobId={self.id}", f"ExcNodeList={excluded}")
            _scontrol("release", self.id)
        else:
            _scontrol("requeue", self.id)

    def _excluded(self) -> list[str]:
        listed = re.search(r"ExcNodeList=(\S+)", _scontrol("show", "job", "-o", self.id))
        if listed is None or listed[1] == "(null)":
            return []
        return _scontrol("show", "hostnames", listed[1]).split()


def _scontrol(*arguments: str) -> str:
    """Raises OSError with scontrol's own words; waits for a controller that is being restarted."""
    for wait_s in (*AWAY_WAITS_S, None):
        ended = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, preexec_fn=_outlive_the_end
        )
        if ended.returncode == 0:
            return ended.stdout
        told = ended.stderr.strip() or ended.stdout.strip()
        if wait_s is None or not any(words in told for words in CONTROLLER_AWAY):
            break
        time.sleep(wait_s)
    raise OSError(f"scontrol {' '.join(arguments)}: {told}")


def _outlive_the_end() -> None:
    # Slurm sends it to all processes of a job that is queued again, and there may be words left to say.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
