"""Measure the overhead of checkpoints, asynchronous and synchronous, and of averages on training steps."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from timed_network import synchronize

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.inputs import Inputs, read_inputs
from svd_ds.parallel import env as environment
from svd_ds.parallel.collectives import broadcast_from_rank0
from svd_ds.parallel.env import Env
from svd_ds.parallel.process_group import leave_on_error, process_group
from svd_ds.run import build_engine
from svd_ds.tasks import Task, read_task
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.ema import ShardEMA
from svd_ds.training.optim import group_lrs
from svd_ds.training.retention import CheckpointConfig

EXAMPLE = """example:
  python tools/launch.py -n 2 --script tools/bench/checkpoint_saves.py -- --steps 8 --rounds 5

Data, network and optimiser are those of the config, with a checkpoint a step. A round is a block of steps of
each kind, after one step that is not timed: so the checkpoint of the previous step is being written during
each timed step. The overhead of checkpoints is (with - without) / without, that of averages is the time in
them over the time of steps without checkpoints. The output has the median of the rounds, with the smallest
and the largest."""
KINDS = {"none": None, "asynchronous": True, "synchronous": False}
"""Kind -> checkpoint.asynchronous, or None for no checkpoint."""


class Training:
    """A training with a run folder for each kind: a restart in a shared one would fence the others."""

    def __init__(self, config: RunConfig, env: Env, inputs: Inputs, task: Task, folder: Path) -> None:
        self.config, self.env, self.task = config, env, task
        self.engine = build_engine(config, env, inputs.precision, task)
        if task.weights is not None:
            self.engine.load_full(task.weights)
        self.ema = ShardEMA(config.ema, self.engine.local_shards())
        self.batches = iter(inputs.loader)
        self.progress = inputs.progress
        self.ema_s = 0.0
        self.stores = {
            kind: Checkpoints(folder / kind / "checkpoints", CheckpointConfig(asynchronous=flag), env, "unet")
            for kind, flag in KINDS.items()
            if flag is not None
        }
        for store in self.stores.values():
            store.start_session(0)

    def step(self) -> None:
        """Take a training step, as the training loop does."""
        config, size = self.config, self.config.batch.size
        taken, accumulation = 0, 1
        while taken < accumulation:
            batch, cursor = next(self.batches)
            taken, accumulation = taken + 1, batch.num_micro_batches
            loss = self.task.objective.loss(self.engine, batch.to(self.env.device)).mean()
            self.engine.backward(loss, accumulation)
        self.engine.gradient_norm()
        self.engine.step(group_lrs(config.optim, config.optim.lr))
        self.progress = self.progress.advance(cursor, size, self.progress.guard)
        synchronize(self.env.device)
        started = time.perf_counter()
        self.ema.update(self.engine.local_shards(), self.progress.samples, size)
        synchronize(self.env.device)
        self.ema_s += time.perf_counter() - started

    def block(self, kind: str, steps: int) -> tuple[float, float]:
        """Time steps with checkpoints of a kind; returns their seconds, and the seconds spent in averages."""
        store = self.stores.get(kind)
        for done in range(steps + 1):
            if done == 1:
                environment.barrier()
                started, self.ema_s = time.perf_counter(), 0.0
            self.step()
            if store is not None:
                store.save(self.progress, self.engine, self.ema, self.task.objective, self.task.settings)
        environment.barrier()
        seconds = time.perf_counter() - started
        if store is not None:
            store.finish()
        return seconds, self.ema_s


def main() -> None:
    keep_freed_memory()
    arguments = parse_arguments()
    config, env = compose(["run.dir=runs/bench", *arguments.overrides]), Env.read()
    with leave_on_error(env), process_group(env):
        inputs = read_inputs(config, env, None)
        folder = Path(broadcast_from_rank0(lambda: tempfile.mkdtemp(prefix="bench-", dir=arguments.folder)))
        training = Training(config, env, inputs, read_task(config, env, inputs), folder)
        for kind in KINDS:
            training.block(kind, 1)  # the first is slower: allocation, choice of kernels
        rounds = [
            {kind: training.block(kind, arguments.steps) for kind in KINDS} for _ in range(arguments.rounds)
        ]
        if env.rank == 0:
            report(env, arguments.steps, rounds, folder)
            shutil.rmtree(folder)


def report(env: Env, steps: int, rounds: list[dict[str, tuple[float, float]]], folder: Path) -> None:
    """Print a table: time of a step, size of a checkpoint, overheads."""
    newest = max(folder.glob("asynchronous/checkpoints/step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    step_ms = 1e3 * statistics.median(kinds["none"][0] for kinds in rounds) / steps
    shares = {
        kind: [100 * (kinds[kind][0] / kinds["none"][0] - 1) for kinds in rounds]
        for kind in KINDS
        if kind != "none"
    }
    shares["averages"] = [100 * ema_s / seconds for seconds, ema_s in (kinds["none"] for kinds in rounds)]
    cells = (
        f"{statistics.median(all_):.1f} % ({min(all_):.1f} to {max(all_):.1f})" for all_ in shares.values()
    )
    print(f"| ranks | ms a step | MB on disk | {' | '.join(shares)} |")
    print(f"| {env.world} x {env.device.type} | {step_ms:.0f} | {size / 1e6:.0f} | {' | '.join(cells)} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides; default: none")
    add("--steps", type=int, default=8, help="steps of a block; default 8")
    add("--rounds", type=int, default=5, help="number of rounds; default 5")
    add("--folder", help="folder of the checkpoints; default: the system's temporary folder")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
