"""W&B sweep in one Slurm job: wandb's agent runs on the batch host, each trial on all nodes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from svd_ds.jobs.slurm import Job, hold_signals, release_signals

if __name__ == "__main__":
    # A signal during the other imports, which take seconds, would end this process.
    hold_signals()

import wandb
from wandb.wandb_agent import Agent, AgentProcess

from svd_ds.cli import print_line, run_cli
from svd_ds.fsync_io import keep_damaged_copy, replace_text
from svd_ds.small_files import read_json

EXAMPLE = """slurm/sweep.sh calls it with the allocation's own values:
  wandb sweep sweeps/lr.yaml
  sbatch --nodes=2 slurm/sweep.sh ENTITY/PROJECT/SWEEP [key=value ...]

Only the arguments after `svd_ds.train` in the command of the sweep are used: Slurm starts the ranks."""
TRAINER = "svd_ds.train"


class JobAgent(Agent):
    """wandb's own agent, with two differences: tools/job.py starts each trial, and requeues the job when the
    ranks of the trial die; and a restart of the job begins with the unfinished trial.
    """

    def __init__(self, sweep: str, job: Job, overrides: list[str]) -> None:
        self.job = job
        self.unfinished = Path("runs", "sweeps", sweep, f"unfinished-{job.id}.json")
        """File with the command of the running trial; the trial removes it when it needs no restart."""
        trial = ["--trial", str(self.unfinished), "--"]
        self.start = [sys.executable, "tools/job.py", *job.to_options(), *trial]
        self.overrides = overrides
        self.trial: AgentProcess | None = None
        """Newest trial."""
        self.end_requested = False
        """True once Slurm asked the job to end, because of its time limit or a preemption."""
        self.sweep_ended = False
        """True once the sweep itself is done or cancelled."""
        signal.signal(signal.SIGUSR1, self._stop_trial)
        # Slurm sends SIGTERM to every process of a job that it ends; the trial handles it.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        release_signals()
        super().__init__(wandb.Api(), multiprocessing.Queue(), sweep_id=sweep)

    def _stop_trial(self, number: int, frame: FrameType | None) -> None:
        self.end_requested = True
        if self.trial is not None and self.trial.poll() is None:
            process = self.trial._popen
            assert process is not None, "a trial is a command, not a function"
            process.send_signal(number)
        elif self.job.is_running():
            # Requeue now: the agent may be waiting for the server.
            self.job.requeue()

    def _run_loop(self, agent_id: str) -> None:
        command = self._sweep_command
        if TRAINER not in command:
            raise ValueError(f"the sweep's command is {command}: it must name {TRAINER} (sweeps/)")
        arguments = command[command.index(TRAINER) + 1 :]
        self._sweep_command = [*self.start, *arguments, *self.overrides]
        if self.unfinished.exists() and not self.end_requested:
            self._resume_trial()
        super()._run_loop(agent_id)

    def _resume_trial(self) -> None:
        try:
            self._command_run(read_json(self.unfinished))
        except ValueError as error:
            copy = keep_damaged_copy(self.unfinished)
            print_line(f"warning: {error}; it was kept as {copy}, and its trial is not resumed")
            self.unfinished.unlink()

    def _command_run(self, command: dict[str, Any]) -> None:
        replace_text(self.unfinished, json.dumps(command))
        # Signals are blocked until the new trial, which they are meant for, can handle them.
        hold_signals()
        try:
            super()._command_run(command)
            self.trial = self._run_processes[command["run_id"]]
        finally:
            release_signals()

    def _heartbeat_commands(self, agent_id: str, run_status: dict[str, bool]) -> list[dict[str, Any]]:
        if not run_status and (self.end_requested or self.unfinished.exists()):
            # The trial ended unfinished. End the job too: its restart begins with this trial.
            self._running = False
            return []
        return super()._heartbeat_commands(agent_id, run_status)

    def _command_exit(self, command: dict[str, Any]) -> None:
        # No trial is left to resume.
        self.unfinished.unlink(missing_ok=True)
        self.sweep_ended = True
        super()._command_exit(command)

    def end(self) -> None:
        """End or requeue the job after the agent has ended, unless a trial has done so already."""
        if self.sweep_ended or not self.job.is_running():
            return
        code = self.trial.poll() if self.trial is not None else None
        killed = code is not None and code < 0
        if not self.end_requested and not killed:
            sys.exit(code or 1)
        reason = (
            "SIGUSR1 asked it to end"
            if self.end_requested or code is None
            else f"signal {-code} ended the trial's own process"
        )
        print_line(f"job {self.job.id} is requeued: {reason}")
        self.job.requeue()


def main() -> None:
    options = parse_arguments()
    parts = options.sweep.split("/")
    if len(parts) != 3:
        raise ValueError(
            f"SWEEP is {options.sweep}: it must be ENTITY/PROJECT/SWEEP, as wandb sweep prints it"
        )
    os.environ.update(zip(("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID"), parts, strict=True))
    # A trial that is stopped early first completes its step; wandb would kill it after 30 s.
    os.environ.setdefault("WANDB_AGENT_KILL_DELAY", "600")
    agent = JobAgent(parts[2], Job.from_options(options), options.overrides)
    agent.run()
    agent.end()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    Job.add_options(parser)
    add("sweep", metavar="ENTITY/PROJECT/SWEEP", help="as wandb sweep prints it")
    add("overrides", nargs="*", metavar="key=value", help="for every trial")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
