"""A W&B sweep in one Slurm job: wandb's agent on the batch host, each trial a run over all the nodes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import wandb
from wandb.wandb_agent import Agent

from svd_ds.door import run_door
from svd_ds.parallel.slurm import Job

EXAMPLE = """slurm/sweep.sh calls it with the allocation's own values:
  wandb sweep conf/sweep/lr.yaml
  sbatch --nodes=2 slurm/sweep.sh ENTITY/PROJECT/SWEEP [key=value ...]

Of the sweep's command only what follows `svd_ds.train` is taken: Slurm starts the ranks."""
TRAINER = "svd_ds.train"


class JobAgent(Agent):
    """wandb's own agent, with two differences: a trial is started through tools/job.py, which queues the job
    again when the trial's ranks die, and a life of the job begins with the trial that the one before left.
    """

    def __init__(self, sweep: str, unfinished: Path, start: list[str], overrides: list[str]) -> None:
        super().__init__(wandb.Api(), multiprocessing.Queue(), sweep_id=sweep)
        self.unfinished = unfinished
        """Holds the running trial. The trial removes it when it needs no other life."""
        self.start = start
        self.overrides = overrides

    def _run_loop(self, agent_id: str) -> None:
        command = self._sweep_command
        if TRAINER not in command:
            raise ValueError(f"the sweep's command is {command}: it must name {TRAINER} (conf/sweep/)")
        arguments = command[command.index(TRAINER) + 1 :]
        self._sweep_command = [*self.start, *arguments, *self.overrides]
        if self.unfinished.exists():
            self._command_run(json.loads(self.unfinished.read_text()))
        super()._run_loop(agent_id)

    def _command_run(self, command: dict[str, Any]) -> None:
        self.unfinished.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.unfinished.with_suffix(".tmp")
        temporary.write_text(json.dumps(command))
        os.replace(temporary, self.unfinished)
        super()._command_run(command)

    def _heartbeat_commands(self, agent_id: str, run_status: dict[str, bool]) -> list[dict[str, Any]]:
        if self.unfinished.exists() and not run_status:
            # Its life is over, and so is the job's: the next begins with it.
            self._running = False
            return []
        return super()._heartbeat_commands(agent_id, run_status)

    def _command_exit(self, command: dict[str, Any]) -> None:
        # Of a sweep that is cancelled or done: there is nothing to go on with.
        self.unfinished.unlink(missing_ok=True)
        super()._command_exit(command)

    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [process._popen for process in self._run_processes.values()]


def main() -> None:
    options = parse_arguments()
    parts = options.sweep.split("/")
    if len(parts) != 3:
        raise ValueError(f"{options.sweep} names no sweep: wandb sweep prints it as ENTITY/PROJECT/SWEEP")
    os.environ.update(zip(("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID"), parts, strict=True))
    # A trial that is stopped early first ends its step; wandb would kill it after 30 s.
    os.environ.setdefault("WANDB_AGENT_KILL_DELAY", "600")
    job = Job.of(options)
    unfinished = Path("runs", "sweeps", parts[2], f"unfinished-{job.id}.json")
    start = [sys.executable, "tools/job.py", *job.options(), "--trial", str(unfinished), "--"]
    agent = JobAgent(parts[2], unfinished, start, options.overrides)

    def hand_on(number: int, frame: FrameType | None) -> None:
        running = agent.processes()
        for process in running:
            process.send_signal(number)
        if not running:
            job.requeue()

    signal.signal(signal.SIGUSR1, hand_on)
    # Slurm sends it to every process of a job that it ends, and the trial answers.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    agent.run()


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
    run_door(main)
