"""One run as a Slurm job, on the batch host: start its ranks, and queue the job again where that helps."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from svd_ds.parallel.slurm import ENDING, Job, hold_signals, release_signals

if __name__ == "__main__":
    # The other imports take seconds, in which a signal would end this process.
    hold_signals()

from svd_ds import compose
from svd_ds.door import print_line, run_door
from svd_ds.parallel.preflight import failing_nodes, leave_out
from svd_ds.training.attempt import FINISHED, INTERRUPTED, REFUSED, Outcome, begin
from svd_ds.training.folder import RunFolder

EXAMPLE = """The scripts in slurm/ call it with the allocation's own values (slurm/lib.sh):
  tools/job.py --job 42 --nodes node1,node2 -- +experiment=stage2 debug=tiny

It ends with 0 when the run is finished, with 2 on a user's mistake; otherwise the job is queued again, unless
its last starts came no further (docs/slurm.md)."""
INTERRUPT_CODE = 130


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
    try:
        folder = run_folder(options.arguments)
        if (damage := begin(folder, job.id, job.starts)) is not None:
            print_line(f"warning: {damage}")
    except ValueError:
        settle(options.trial)
        raise
    code = 0
    faults = failing_nodes(job, folder.path) if job.preflight and not request.number else {}
    # Checks that were ended with the job tell nothing of its nodes.
    if faults and not request.number and job.is_running():
        leave_out(job, faults)
        return
    if not faults and not request.number:
        step = job.step([sys.executable, "-m", "svd_ds.train", *options.arguments])
        request.hand_to(step)
        code = step.wait()
    outcome = Outcome.read(folder)
    settled = settled_code(outcome, code)
    # Cancelled, out of time, or taken away: Slurm queues it again where it means to.
    running = job.is_running()
    stopped = settled == INTERRUPT_CODE or (settled is None and running and request.number == signal.SIGTERM)
    if options.trial is not None and stopped:
        settled = 0  # early, by W&B's word to rank 0 or to the agent, whichever was first
    if settled is not None:
        settle(options.trial)
        sys.exit(settled)
    if not running:
        sys.exit(code)
    print_line(f"job {job.id} is queued again: {reason(outcome, request.number, code)}")
    job.requeue()


def settle(trial: Path | None) -> None:
    """The run needs no other life: a sweep's next trial may begin."""
    if trial is not None:
        trial.unlink(missing_ok=True)


def run_folder(arguments: Sequence[str]) -> RunFolder:
    """Where a run with these arguments lives. Raises ValueError for a mistake in them: no rank starts."""
    try:
        settings = compose.compose([word for word in arguments if not word.startswith("-")])
    except compose.COMPOSE_ERRORS as error:
        raise ValueError(compose.explain(error)) from None
    return RunFolder(Path(settings.run.dir))


def settled_code(outcome: Outcome | None, code: int) -> int | None:
    """The job's exit code where the run needs no other life; None where it does.

    `code` is srun's: of a step that it ended itself it says 143, whatever the rank that failed first said.
    """
    kind = outcome.kind if outcome is not None else None
    if kind == FINISHED and code == 0:
        return 0
    if kind == REFUSED:
        return 2
    return INTERRUPT_CODE if kind == INTERRUPTED else None


def reason(outcome: Outcome | None, asked: int, code: int) -> str:
    if asked:
        return f"{signal.Signals(asked).name} asked it to end"
    if outcome is not None:
        return ": ".join(filter(None, (f"rank {outcome.rank} {outcome.kind}", outcome.words)))
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
    run_door(main)
