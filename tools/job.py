"""One run as a Slurm job: start its ranks from the batch host, and requeue the job if a restart may help."""

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

from svd_ds.jobs.slurm import STOP_SIGNALS, Job, hold_signals, release_signals

if __name__ == "__main__":
    # A signal during the other imports, which take seconds, would end this process.
    hold_signals()

from svd_ds import compose
from svd_ds.cli import print_line, run_cli
from svd_ds.config import RunConfig
from svd_ds.fsync_io import replace_text
from svd_ds.jobs.outcome import FINISHED, INTERRUPTED, REFUSED, JobOutcome, outcome_path
from svd_ds.jobs.preflight import exclude_nodes, failing_nodes
from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.model.ops.trial import KernelSettings
from svd_ds.parallel.env import STARTED, restart_id
from svd_ds.plan.admission import PlannedJob, check_fits, query_gpu
from svd_ds.plan.planner import DoesNotFitError
from svd_ds.plan.requests import profile_gpu_steps
from svd_ds.run_folder import RunFolder

EXAMPLE = """The scripts in slurm/ call it with the allocation's own values (slurm/lib.sh):
  tools/job.py --job 42 --nodes node1,node2 -- +experiment=stage2 debug=tiny

Exit code: 0 when the run is finished, 2 on a user's mistake. Otherwise the job is requeued, unless its last
restarts saved no new checkpoint (docs/slurm.md)."""
INTERRUPT_CODE = 130
CLOCKS = Path("runs/.jobs")
"""Folder of the start times of jobs, relative to the folder that jobs are submitted from."""


class StopSignal:
    """Signal that asked this job to end; it is forwarded to the ranks as USR1."""

    def __init__(self) -> None:
        self.number = 0
        """Number of the signal; 0 until it arrives."""
        self.step: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        release_signals()

    def forward_to(self, step: subprocess.Popen[bytes]) -> None:
        """Send USR1 to `step` when the signal arrives, or now if it has already arrived."""
        self.step = step
        if self.number:
            # The signal arrived while srun was being started.
            step.send_signal(signal.SIGUSR1)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.step is not None:
            self.step.send_signal(signal.SIGUSR1)


def main() -> None:
    stop = StopSignal()
    options = parse_arguments()
    job = Job.from_options(options)
    clock = JobClock(job.id, options.arguments)
    try:
        config = read_config(options.arguments, clock)
        folder = RunFolder(Path(config.run.dir))
        plan = plan_job(config, job)
        if (damage := record_queued_restart(folder, int(job.id), job.max_restarts)) is not None:
            print_line(f"warning: {damage}")
        faults = check_nodes(config, job, folder) if job.preflight and not stop.number else {}
        if plan is not None and not faults and (line := plan.wait(lambda: bool(stop.number))):
            print_line(line)
    except DoesNotFitError as error:
        record_refusal(folder, error)
        mark_settled(options.trial, clock)
        raise
    except ValueError:
        mark_settled(options.trial, clock)
        raise
    code = 0
    # Checks that ended with the job say nothing about its nodes.
    if faults and not stop.number and job.is_running():
        exclude_nodes(job, faults)
        return
    if not faults and not stop.number:
        step = job.start_step([sys.executable, "-m", "svd_ds.train", *options.arguments], **clock.variables)
        stop.forward_to(step)
        code = step.wait()
    outcome = JobOutcome.read(folder)
    final_code = settled_code(outcome, code)
    # If the job was cancelled, preempted or is out of time, Slurm itself decides whether to requeue it.
    running = job.is_running()
    terminated = final_code is None and running and stop.number == signal.SIGTERM
    stopped = final_code == INTERRUPT_CODE or terminated
    if options.trial is not None and stopped:
        final_code = 0  # W&B stopped the trial early, through rank 0 or through the agent
    if final_code is not None:
        mark_settled(options.trial, clock)
        sys.exit(final_code)
    if not running:
        sys.exit(code)
    bad_nodes = {n: fault for n, fault in outcome.nodes.items() if n in job.nodes} if outcome else {}
    if bad_nodes:
        exclude_nodes(job, bad_nodes)
        return
    print_line(f"job {job.id} is requeued: {reason(outcome, stop.number, code)}")
    job.requeue()


class JobClock:
    """Time at which this job first started the run: the value of `${now:...}` on every rank of every restart.

    A run folder named after the time is therefore the same folder for all restarts. The time is kept in a
    file, since Slurm does not keep it over a requeue; the file is written only if the config uses the time.
    """

    def __init__(self, job: str, arguments: Sequence[str]) -> None:
        # A sweep starts several runs in one job.
        digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
        self.path = CLOCKS / f"{job}-{digest}"
        self.variables: dict[str, str] = {}
        """Environment variables of the ranks."""
        self._restarted = restart_id()[1] > 0

    def read(self) -> datetime:
        """Return the time, which the first start writes to the file."""
        if not self.variables:
            # A cluster that was set up anew reuses job ids.
            if not (self._restarted and self.path.exists()):
                replace_text(self.path, datetime.now().isoformat())
            self.variables = {STARTED: self.path.read_text()}
        return datetime.fromisoformat(self.variables[STARTED])

    def discard(self) -> None:
        """Remove the file: the job does not restart the run any more."""
        self.path.unlink(missing_ok=True)


def mark_settled(trial: Path | None, clock: JobClock) -> None:
    """Note that the run needs no restart: the next trial of a sweep may begin."""
    clock.discard()
    if trial is not None:
        trial.unlink(missing_ok=True)


def check_nodes(config: RunConfig, job: Job, folder: RunFolder) -> dict[str, str]:
    """Return node -> why the job should not use it; print on which nodes the network's kernels fail."""
    kernels = KernelSettings.read(config.model) if config.task == "unet" else None
    return failing_nodes(job, folder.path, kernels=kernels)


def plan_job(config: RunConfig, job: Job) -> PlannedJob | None:
    """Start to plan the run on the job's GPUs; return None if there are none, or --no-plan is given."""
    if not job.plan or not job.gpus:
        return None
    ranks = job.gpus * len(job.nodes)
    return PlannedJob(lambda: check_fits(config, query_gpu(), ranks, job.gpus, profile_gpu_steps))


def record_refusal(folder: RunFolder, error: ValueError) -> None:
    """Record that the run was refused, as its ranks would."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    JobOutcome(REFUSED, 0, str(error), restart_id()).record(outcome_path(folder))


def read_config(arguments: Sequence[str], clock: JobClock) -> RunConfig:
    """Compose the config of a run with these arguments.

    Raises:
        ValueError: a mistake in the arguments; no rank has been started.
    """
    try:
        return compose.compose(arguments, clock.read)
    except compose.COMPOSE_ERRORS as error:
        raise ValueError(compose.explain(error)) from None


def settled_code(outcome: JobOutcome | None, code: int) -> int | None:
    """Return the exit code of the job; None if the run needs a restart.

    Args:
        outcome: recorded outcome of the ranks; None if no rank recorded one.
        code: exit code of srun; for a step that srun ended itself 143, whatever the first rank to fail
            returned.
    """
    kind = outcome.kind if outcome is not None else None
    if kind == FINISHED and code == 0:
        return 0
    if kind == REFUSED:
        return 2
    return INTERRUPT_CODE if kind == INTERRUPTED else None


def reason(outcome: JobOutcome | None, signal_number: int, code: int) -> str:
    """Describe why the job is requeued."""
    if signal_number:
        return f"{signal.Signals(signal_number).name} asked it to end"
    if outcome is not None:
        return ": ".join(filter(None, (f"rank {outcome.rank} {outcome.kind}", outcome.message)))
    return f"srun ended with {code}, and no rank reported a reason"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    Job.add_options(parser)
    add("--trial", type=Path, metavar="FILE", help="trial of a sweep: removed once it needs no restart")
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="argument of python -m svd_ds.train")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
