"""Slurm job, controlled from its batch host: steps are started with srun, requeues requested with scontrol.

A job that still runs may requeue itself; one that was cancelled or preempted is left to Slurm. A signal that
asks the job to end must not be lost while a process is being started.
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

CONTROLLER_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out")
RETRY_WAITS_S = (5.0, 30.0, 120.0)
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask a job to end."""
libc = ctypes.CDLL(None)


def hold_signals() -> None:
    """Block the signals in STOP_SIGNALS, here and in processes that are started meanwhile, until each can
    handle them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release_signals() -> None:
    """Unblock the signals in STOP_SIGNALS; pending ones are delivered at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@dataclass(frozen=True)
class Job:
    """One allocation of Slurm; its methods run on the batch host."""

    id: str
    nodes: tuple[str, ...]
    cpus: int
    """CPUs per task."""
    gpus: int
    """GPUs per node."""
    max_restarts: int
    """Restarts of a run in a row that may begin after the same step."""
    preflight: bool
    """True if the nodes are checked before the ranks start."""
    plan: bool = True
    """True if a run that cannot fit its GPUs is refused before the ranks start."""

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the options that slurm/lib.sh passes: the allocation, and the settings of the site."""
        add = parser.add_argument
        add("--job", required=True, type=int, metavar="ID", help="the job's id")
        add("--nodes", required=True, metavar="NAMES", help="its nodes, separated by commas")
        add("--cpus", type=int, default=1, metavar="N", help="CPUs per task; default: %(default)s")
        add("--gpus", type=int, default=0, metavar="N", help="GPUs per node; default: %(default)s")
        add(
            "--max-restarts",
            type=int,
            default=3,
            metavar="N",
            help="restarts in a row without a new checkpoint; default: %(default)s",
        )
        add("--no-preflight", action="store_true", help="do not check the nodes before the ranks start")
        add("--no-plan", action="store_true", help="start a run even if its plan does not fit the GPUs")

    @staticmethod
    def from_options(options: Namespace) -> Job:
        """Build the job from parsed `add_options`."""
        nodes = tuple(options.nodes.split(","))
        numbers = options.cpus, options.gpus, options.max_restarts
        return Job(str(options.job), nodes, *numbers, not options.no_preflight, not options.no_plan)

    def to_options(self) -> list[str]:
        """Return the command-line options that `from_options` turns into this job."""
        numbers = {"--cpus": self.cpus, "--gpus": self.gpus, "--max-restarts": self.max_restarts}
        words = [word for name, number in numbers.items() for word in (name, str(number))]
        switches = [] if self.preflight else ["--no-preflight"]
        switches += [] if self.plan else ["--no-plan"]
        return ["--job", self.id, "--nodes", ",".join(self.nodes), *words, *switches]

    def start_step(self, command: Sequence[str], *options: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start `command` as the tasks of a job step.

        One failed task ends the step, so that no other task waits in a collective for ever. The end of this
        process ends the step, too.

        Args:
            options: options of srun.
            variables: environment variables of the tasks.
        """
        return subprocess.Popen(
            ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus}", *options, *command],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            # Signals of the job's process group must reach the tasks only through this process.
            process_group=0,
            preexec_fn=_end_with_parent,
        )

    def is_running(self) -> bool:
        """Return True unless Slurm is ending the job or has requeued it."""
        shown = _scontrol("show", "job", "-o", self.id)
        state = re.search(r"JobState=(\w+)", shown)
        return state is not None and state[1] == "RUNNING"

    def requeue(self, exclude: Sequence[str] = ()) -> None:
        """End the job and queue it again. Slurm then ends this process.

        Args:
            exclude: nodes that the job must not run on from now on.

        Raises:
            OSError: scontrol refuses.
        """
        if exclude:
            excluded = ",".join([*self._excluded(), *exclude])
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
    """Run scontrol and return its output; wait for a controller that is being restarted.

    Raises:
        OSError: scontrol fails; the message includes its error.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        ended = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, preexec_fn=_ignore_sigterm
        )
        if ended.returncode == 0:
            return ended.stdout
        error = ended.stderr.strip() or ended.stdout.strip()
        if wait_s is None or not any(message in error for message in CONTROLLER_UNREACHABLE):
            break
        time.sleep(wait_s)
    raise OSError(f"scontrol {' '.join(arguments)}: {error}")


def _ignore_sigterm() -> None:
    # Slurm sends SIGTERM to all processes of a requeued job, also to scontrol before it has written its
    # output.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
