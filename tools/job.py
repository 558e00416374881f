"""One run as a Slurm job, on the batch host: start its ranks, and queue the job again where that helps."""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from svd_ds.jobs.slurm import ENDING, Job, hold_signals, release_signals

if __name__ == "__main__":
    # The other imports take seconds, in which a signal would end this process.
    hold_signals()

from svd_ds import compose
from svd_ds.cli import print_line, run_cli
from svd_ds.fsync_io import replace_text
from svd_ds.jobs.outcome import FINISHED, INTERRUPTED, REFUSED, JobOutcome
from svd_ds.jobs.preflight import exclude_nodes, failing_nodes
from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.parallel.env import STARTED, restart_id
from svd_ds.run_folder import RunFolder

EXAMPLE = """The scripts in slurm/ call it with the allocation's own values (slurm/lib.sh):
  tools/job.py --job 42 --nodes node1,node2 -- +experiment=stage2 debug=tiny

It ends with 0 when the run is finished, with 2 on a user's mistake; otherwise the job is queued again, unless
its last starts came no further (docs/slurm.md)."""
INTERRUPT_CODE = 130
CLOCKS = Path("runs/.jobs")
"""Where the times of jobs are kept, from the folder that jobs are submitted in."""


class Request:
    """The signal by which this life was asked to end, handed on to the ranks as USR1."""

    def __init__(self) -> None:
        self.number = 0
        self.step: subprocess.Popen[bytes] | None = None
        for number in ENDING:
            signal.signal(number, self._receive)
        release_signals()

    def hand_to(self, step: subprocess.Popen[bytes]) -> None:
        self.step = step
        if self.number:
            # It came while srun was being started.
            step.send_signal(signal.SIGUSR1)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.step is not None:
            self.step.send_signal(signal.SIGUSR1)


def main() -> None:
    request = Request()
    options = parse_arguments()
    job = Job.of(options)
    clock = JobClock(job.id, options.arguments)
    try:
        folder = run_folder(options.arguments, clock)
        if (damage := record_queued_restart(folder, int(job.id), job.max_restarts)) is not None:
            print_line(f"warning: {damage}")
    except ValueError:
        settle(options.trial, clock)
        raise
    code = 0
    faults = failing_nodes(job, folder.path) if job.preflight and not request.number else {}
    # Checks that were ended with the job tell nothing of its nodes.
    if faults and not request.number and job.is_running():
        exclude_nodes(job, faults)
        return
    if not faults and not request.number:
        step = job.step([sys.executable, "-m", "svd_ds.train", *options.arguments], **clock.variables)
        request.hand_to(step)
        code = step.wait()
    outcome = JobOutcome.read(folder)
    settled = settled_code(outcome, code)
    # Cancelled, out of time, or taken away: Slurm queues it again where it means to.
    running = job.is_running()
    stopped = settled == INTERRUPT_CODE or (settled is None and running and request.number == signal.SIGTERM)
    if options.trial is not None and stopped:
        settled = 0  # early, by W&B's word to rank 0 or to the agent, whichever was first
    if settled is not None:
        settle(options.trial, clock)
        sys.exit(settled)
    if not running:
        sys.exit(code)
    bad = {node: why for node, why in outcome.nodes.items() if node in job.nodes} if outcome else {}
    if bad:
        exclude_nodes(job, bad)
        return
    print_line(f"job {job.id} is queued again: {reason(outcome, request.number, code)}")
    job.requeue()


class JobClock:
    """When the run was first started by this job: what `${now:...}` gives in every restart and on every rank.

    A run folder named after the time is then one folder for all of them. The time is kept in a file, because
    Slurm keeps none over a requeue, and only where a value of the config asks for it.
    """

    def __init__(self, job: str, arguments: Sequence[str]) -> None:
        # A sweep starts several runs in one job.
        digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
        self.path = CLOCKS / f"{job}-{digest}"
        self.variables: dict[str, str] = {}
        """For the ranks."""
        self._restarted = restart_id()[1] > 0

    def read(self) -> datetime:
        """The time, kept from the first start on."""
        if not self.variables:
            # A cluster that is set up anew gives job numbers again.
            if not (self._restarted and self.path.exists()):
                replace_text(self.path, datetime.now().isoformat())
            self.variables = {STARTED: self.path.read_text()}
        return datetime.fromisoformat(self.variables[STARTED])

    def forget(self) -> None:
        """The job starts the run no more."""
        self.path.unlink(missing_ok=True)


def settle(trial: Path | None, clock: JobClock) -> None:
    """The run needs no other start: a sweep's next trial may begin."""
    clock.forget()
    if trial is not None:
        trial.unlink(missing_ok=True)


def run_folder(arguments: Sequence[str], clock: JobClock) -> RunFolder:
    """Where a run with these arguments lives. Raises ValueError for a mistake in them: no rank starts."""
    try:
        settings = compose.compose(arguments, clock.read)
    except compose.COMPOSE_ERRORS as error:
        raise ValueError(compose.explain(error)) from None
    return RunFolder(Path(settings.run.dir))


def settled_code(outcome: JobOutcome | None, code: int) -> int | None:
    """The job's exit code where the run needs no other life; None where it does.

    `code` is srun's: of a step that it ended itself it says 143, whatever the rank that failed first said.
    """
    kind = outcome.kind if outcome is not None else None
    if kind == FINISHED and code == 0:
        return 0
    if kind == REFUSED:
        return 2
    return INTERRUPT_CODE if kind == INTERRUPTED else None


def reason(outcome: JobOutcome | None, asked: int, code: int) -> str:
    if asked:
        return f"{signal.Signals(asked).name} asked it to end"
    if outcome is not None:
        return ": ".join(filter(None, (f"rank {outcome.rank} {outcome.kind}", outcome.message)))
    return f"srun ended with {code}, and no rank said why"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    Job.add_options(parser)
    add("--trial", type=Path, metavar="FILE", help="of a sweep: removed once the trial needs no other life")
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="of python -m svd_ds.train")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
