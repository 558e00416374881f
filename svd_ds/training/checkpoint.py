"""Checkpoints that a killed run can trust: written under a temporary name, made durable, then renamed.

    checkpoints/lives.jsonl     a line for each start of the run (svd_ds.model.lives)
    checkpoints/step-0000100/
        COMPLETE                the marker: without it the folder does not count
        state.json              Progress
        adam.json               how many steps the optimiser has taken
        objective.safetensors   what the objective keeps, where it keeps anything: a discriminator
        unet/config.json        UNetConfig, and lora.json where adapters are trained; decoder/ where that is
        unet/rank-00000-of-00002.safetensors            this rank's slices of the weights, frozen ones too
        adam-exp_avg/... adam-exp_avg_sq/...            and of the optimiser's moments
        ema-power-0.050/...                             and of each average of those that are trained

Slices are flat float32 and read on any number of ranks, weights and averages without DeepSpeed too.

A save is told in four steps; only the first one holds the training up.

1. Every rank copies what is its own to host memory.
2. Behind its back a thread of each rank writes the copy into the draft, and waits for the disk.
3. At the end of each step the ranks ask each other whether all have written. So no thread waits for another
   rank, and all ranks learn of a failure at the same place.
4. Rank 0's thread then writes the marker, renames the draft, and removes what is old.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svd_ds.fsync_io import write_tensors, write_text
from svd_ds.model.lives import complete_checkpoints
from svd_ds.model.slices import SliceFiles, network_of, slice_name
from svd_ds.parallel.collectives import SharedError, agreed, highest_over_ranks, told_by_first
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.training.ema import ShardEMA
from svd_ds.training.folder import step_name
from svd_ds.training.keeping import (
    CheckpointConfig,
    check_still_ours,
    draft_name,
    publish,
    take_over,
)
from svd_ds.training.objective import Objective
from svd_ds.training.state import Progress

OBJECTIVE = "objective.safetensors"
ADAM = "adam.json"
DONE, UNDER_WAY, FAILED = range(3)
Settings = Mapping[str, Mapping[str, Any]]
"""The files beside a network's weights, by name: config.json, and lora.json where adapters are trained."""


@dataclass
class _Pending:
    """A save that is under way."""

    draft: Path
    job: Future[None]
    """This rank's last piece of work for it."""
    written: bool = False
    """By every rank: what is left is rank 0's."""


class Checkpoints:
    """The checkpoints of one run, seen from one rank. A context: leaving it finishes what is being saved."""

    def __init__(self, folder: Path, config: CheckpointConfig, env: Env, network: str) -> None:
        """network: what the run trains, unet or decoder, and so the name of the weights' folder."""
        self.folder, self.config, self.env, self.network = folder, config, env, network
        self._life = ""
        self._host: dict[str, dict[str, Tensor]] = {}
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # An error that not all ranks know of leaves none to agree with: the draft then stays one.
            if kind is None or issubclass(kind, SharedError):
                self.finish()
        finally:
            self._thread.shutdown()

    def latest(self) -> Path | None:
        """The newest that counts. Ask on one rank: another may not see the same moment."""
        return next(reversed(complete_checkpoints(self.folder).values()), None)

    def check_network(self, path: Path) -> None:
        """Raises ValueError where a checkpoint holds another network than the run trains."""
        held = network_of(path)
        if held != self.network:
            raise ValueError(f"{path} is a checkpoint of a {held}, and this run trains a {self.network}")

    def begin(self, step: int) -> None:
        """Begin a life of the run behind `step`. All ranks call it, before they save."""
        self._life = told_by_first(lambda: take_over(self.folder, step))

    def save(
        self, progress: Progress, engine: Engine, ema: ShardEMA, objective: Objective, settings: Settings
    ) -> None:
        """Begin a checkpoint, and train on as soon as what it will hold is copied; with
        checkpoint.asynchronous=false, as soon as it is there. All ranks call it.

        Raises SharedError where this one or the one before cannot be written; the earlier ones stay.
        """
        self._wait_for_writers()
        slices = {self.network: {**engine.local_shards(), **engine.frozen_shards()}}
        slices |= {f"adam-{moment}": shards for moment, shards in engine.moments().items()}
        slices |= {f"ema-{profile}": ema.shards(profile) for profile in ema.config.names}
        own = slice_name(self.env.rank, self.env.world)
        tensors, texts = {f"{folder}/{own}": values for folder, values in slices.items()}, {}
        if self.env.rank == 0:
            if state := objective.state():
                tensors[OBJECTIVE] = state
            texts = {f"{self.network}/{name}": _json(values) for name, values in settings.items()}
            texts |= {"state.json": progress.as_json(), ADAM: _json({"updates": engine.updates})}
        if self.config.asynchronous:
            tensors = {path: self._copied(path, values) for path, values in tensors.items()}
        draft = self.folder / draft_name(step_name(progress.step), self._life)
        self._pending = _Pending(draft, self._submit(lambda: _write(draft, tensors, texts)))
        if not self.config.asynchronous:
            self.finish()

    def settle(self) -> None:
        """Bring a save that is under way one stage further, where every rank is ready for it.

        All ranks call it, at the end of a step. Raises SharedError on all where one could not write.
        """
        if (pending := self._pending) is None:
            return
        stage = highest_over_ranks(_stage(pending.job))
        if stage == FAILED:
            self._pending = None
            try:
                # Who has taken over has also cleared our drafts away: that is no fault of the disk.
                told_by_first(lambda: check_still_ours(self.folder, self._life))
                agreed(pending.job.result)
            finally:
                if self.env.rank == 0:
                    shutil.rmtree(pending.draft, ignore_errors=True)
        elif stage == DONE and pending.written:
            self._pending = None
        elif stage == DONE:
            pending.written = True
            if self.env.rank == 0:
                pending.job = self._submit(lambda: publish(pending.draft, self._life, self.config))

    def finish(self) -> None:
        """Wait until what was saved is there. All ranks call it; raises as `settle` does."""
        while self._pending is not None:
            wait([self._pending.job])
            self.settle()

    def load(self, path: Path, engine: Engine, ema: ShardEMA, objective: Objective) -> Progress:
        """Put a checkpoint of any number of ranks into the engine, the averages and the objective."""
        engine.load_shards(self._own_slices(path / self.network, engine, engine.shapes))
        for moment, shards in engine.moments().items():
            for name, values in self._own_slices(path / f"adam-{moment}", engine, shards):
                shards[name].copy_(values)
        engine.updates = json.loads((path / ADAM).read_text())["updates"]
        for profile in ema.config.names:
            ema.load(profile, dict(self._own_slices(path / f"ema-{profile}", engine, ema.names)))
        if (path / OBJECTIVE).exists():
            objective.load_state(load_file(path / OBJECTIVE))
        return Progress.read(path / "state.json")

    def reload(self, engine: Engine, ema: ShardEMA, objective: Objective) -> Progress:
        """Put the newest back. All ranks call it; SharedError where there is none."""
        self.finish()
        path = told_by_first(self.latest)
        if path is None:
            raise SharedError(f"{self.folder} has no checkpoint yet to go back to")
        return self.load(path, engine, ema, objective)

    def _own_slices(self, folder: Path, engine: Engine, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """This rank's slice of each parameter, whoever wrote it."""
        files = SliceFiles(folder)
        for name in names:
            numel = engine.shapes[name].numel()
            each = -(-numel // self.env.world)
            yield name, files.read(name, numel, self.env.rank * each, (self.env.rank + 1) * each)

    @torch.no_grad()
    def _copied(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which is kept from one save to the next: to find it anew takes longer."""
        copies = self._host.setdefault(path, {})
        for name, value in tensors.items():
            if name not in copies:
                copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        torch._foreach_copy_([copies[name] for name in tensors], list(tensors.values()), non_blocking=True)
        if self.env.device.type == "cuda":
            torch.cuda.synchronize(self.env.device)
        return {name: copies[name] for name in tensors}

    def _wait_for_writers(self) -> None:
        """Until every rank has written the save before, whose copies are then free."""
        if self._pending is not None and not self._pending.written:
            wait([self._pending.job])
            self.settle()

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        """Have the thread do `work` after what it was given before, if that did not fail."""
        before = self._pending.job if self._pending is not None else None

        def job() -> None:
            if before is not None:
                before.result()
            work()

        return self._thread.submit(job)


def _write(draft: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    try:
        for path, values in tensors.items():
            write_tensors(draft / path, values)
        for path, text in texts.items():
            write_text(draft / path, text)
    except OSError as error:
        raise OSError(f"the checkpoint {draft} cannot be written: {error}") from error


def _stage(job: Future[None]) -> int:
    if not job.done():
        return UNDER_WAY
    return FAILED if job.exception() else DONE


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
