"""Checkpoints that a killed run can trust: written under a temporary name, made durable, then renamed.

    checkpoints/step-0000100/
        COMPLETE                the manifest: size and checksum of every other file. Without it the folder
                                does not count
        state.json              Progress
        adam.json               how many steps the optimiser has taken
        objective.safetensors   what the objective keeps, where it keeps anything: a discriminator
        unet/config.json        UNetConfig, and lora.json where adapters are trained; decoder/ where that is
        unet/rank-00000-of-00002.safetensors            this rank's slices of the weights, frozen ones too
        adam-exp_avg/... adam-exp_avg_sq/...            and of the optimiser's moments
        ema-power-0.050/...                             and of each average of those that are trained

Slices are flat float32 and read on any number of ranks, weights and averages without DeepSpeed too.

A save has four stages; only the first one holds the training up.

1. Every rank copies what is its own to host memory.
2. A thread of each rank writes the copy into the draft, waits for the disk, and computes the digests. A value
   that is not finite ends the save.
3. At the end of each step the ranks ask each other whether all have written. So no thread waits for another
   rank, and all ranks learn of a failure at the same place. They also wait until a step after the saved one
   was taken: weights that the guard refuses to train on are not published.
4. Rank 0's thread then writes the manifest, renames the draft, and removes what is old.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from svd_ds.parallel.collectives import (
    SharedError,
    all_gather_objects,
    all_reduce_max,
    broadcast_from_rank0,
    raise_on_all_ranks,
)
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env, restart_id
from svd_ds.run_folder import step_name
from svd_ds.training.checkpoint_files import Settings, elements_of, own_tensors, read_files, shared_files
from svd_ds.training.draft import DONE, NOT_FINITE, Files, HostCopies, PendingSave, save_stage, write_draft
from svd_ds.training.ema import ShardEMA
from svd_ds.training.objectives.base import Objective
from svd_ds.training.progress import Progress
from svd_ds.training.retention import (
    CheckpointConfig,
    acquire,
    check_not_fenced,
    commit,
    draft_name,
)
from svd_ds.training.verify import newest_intact_checkpoint
from svd_ds.weights.manifest import Manifest
from svd_ds.weights.restarts import complete_checkpoints
from svd_ds.weights.shards import checkpoint_network


class NonFiniteError(SharedError):
    """A save was given up, for a weight, an average or a moment is not finite; the message names it."""


class Checkpoints:
    """The checkpoints of one run, seen from one rank. A context: leaving it finishes what is being saved."""

    def __init__(self, folder: Path, config: CheckpointConfig, env: Env, network: str) -> None:
        """network: what the run trains, unet or decoder, and so the name of the weights' folder."""
        self.folder, self.config, self.env, self.network = folder, config, env, network
        self.token = ""
        """This start's fencing token; empty before `start_session`."""
        self._host = HostCopies(env.device)
        self._pending: PendingSave | None = None
        self._unproven: int | None = None
        """Step of the checkpoint that was loaded or published last, as long as no step after it was taken."""
        self._good = -1
        """Newest step of which a checkpoint is known to train: a step after it was taken."""
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
        held = checkpoint_network(path)
        if held != self.network:
            raise ValueError(f"{path} is a checkpoint of a {held}, and this run trains a {self.network}")

    def start_session(self, step: int, origin: str = "") -> None:
        """Start the run after `step`. All ranks call it, before they save.

        Args:
            origin: the checkpoint named by run.resume that this start descends from; empty without one.
        """
        self.token = broadcast_from_rank0(lambda: acquire(self.folder, step, origin, restart_id()))

    def check_not_fenced(self) -> None:
        """Raise ValueError where another start has taken the run folder over: this one may not write."""
        check_not_fenced(self.folder, self.token)

    def is_fenced(self) -> bool:
        """Whether another start is known to have taken the run folder over."""
        try:
            if self.token:
                check_not_fenced(self.folder, self.token)
        except ValueError:
            return True
        except OSError:
            pass  # a file system that does not answer says nothing
        return False

    def save(
        self, progress: Progress, engine: Engine, ema: ShardEMA, objective: Objective, settings: Settings
    ) -> None:
        """Begin a checkpoint, and train on as soon as what it will hold is copied; with
        checkpoint.asynchronous=false, as soon as it is written. All ranks call it, after a taken step.

        Raises:
            SharedError: this one or the one before cannot be written; the earlier ones stay.
            NonFiniteError: likewise, for its values are not finite.
        """
        self._note_taken()
        self._wait_for_writers()
        tensors: Files = own_tensors(self.network, self.env, engine, ema)
        texts: dict[str, str] = {}
        if self.env.rank == 0:
            shared, texts = shared_files(self.network, progress, engine, objective, settings)
            tensors = {**tensors, **shared}
        files = self._host.copy(tensors) if self.config.asynchronous else tensors
        draft = self.folder / draft_name(step_name(progress.step), self.token)
        used = elements_of(self.env, engine)
        job = self._submit(lambda: write_draft(draft, files, texts, used))
        self._pending = PendingSave(progress.step, draft, job)
        if not self.config.asynchronous:
            wait([job])
            self._advance(may_publish=False)

    def poll_pending_save(self, taken: bool = True) -> None:
        """Bring a save that is under way one stage further, where every rank is ready for it.

        All ranks call it, at the end of a step.

        Args:
            taken: whether the step was taken, and not skipped by the guard. A save waits for a taken step
                after it before it is published.

        Raises:
            SharedError: a rank could not write; on all ranks.
            NonFiniteError: a rank's values are not finite; on all ranks.
        """
        if taken:
            self._note_taken()
        if self._pending is not None:
            self._advance(self._pending.proven)

    def finish(self) -> None:
        """Wait until what was saved is there, whether or not a step followed. All ranks call it; raises as
        `poll_pending_save` does."""
        while self._pending is not None:
            wait([self._pending.job])
            self._advance(may_publish=True)

    def load(self, path: Path, engine: Engine, ema: ShardEMA, objective: Objective) -> Progress:
        """Put a checkpoint of any number of ranks into the engine, the averages and the objective."""
        progress = read_files(path, self.network, self.env, engine, ema, objective)
        self._unproven = progress.step
        return progress

    def reload(self, engine: Engine, ema: ShardEMA, objective: Objective, why: str) -> Progress:
        """Put back the newest whole checkpoint that a taken step followed. All ranks call it.

        A newer one is kept under another name, and a save that no taken step followed is dropped.

        Args:
            why: the run goes back, for the error.

        Raises:
            SharedError: there is no checkpoint to go back to.
        """
        self._drop_unproven()
        path = newest_intact_checkpoint(self.folder, self.env, self.config.verify, self._is_good)
        if path is None:
            raise SharedError(f"{why}; {self.folder} has no checkpoint yet to go back to")
        progress = self.load(path, engine, ema, objective)
        self._good = min(self._good, progress.step)
        return progress

    def _is_good(self, step: int, manifest: Manifest) -> bool:
        return step <= self._good or manifest.proven

    def _note_taken(self) -> None:
        if self._unproven is not None:
            self._good, self._unproven = self._unproven, None
        if self._pending is not None:
            self._pending.proven = True

    def _advance(self, may_publish: bool) -> None:
        """Bring the save that is under way one stage further. All ranks call it, with the same argument."""
        pending = self._pending
        assert pending is not None
        stage = all_reduce_max(save_stage(pending.job))
        if stage >= NOT_FINITE:
            self._give_up(pending, stage)
        elif stage == DONE and pending.written:
            self._pending = None
        elif stage == DONE and may_publish:
            parts = all_gather_objects([pending.job.result()])
            pending.written = True
            self._unproven = pending.step
            if pending.proven:
                self._note_taken()
            files = {name: digest for part in parts for name, digest in part.items()}
            manifest, good = Manifest(self.token, len(parts), pending.proven, files), self._good
            if self.env.rank == 0:
                pending.job = self._submit(lambda: commit(pending.draft, manifest, self.config, good))

    def _give_up(self, pending: PendingSave, stage: int) -> None:
        self._pending = None
        try:
            # Who has taken over has also cleared our drafts away: that is no fault of the disk.
            broadcast_from_rank0(lambda: check_not_fenced(self.folder, self.token))
            try:
                raise_on_all_ranks(pending.job.result)
            except SharedError as error:
                if stage == NOT_FINITE:
                    raise NonFiniteError(str(error)) from None
                raise
        finally:
            if self.env.rank == 0:
                shutil.rmtree(pending.draft, ignore_errors=True)

    def _drop_unproven(self) -> None:
        """Drop a save that no taken step followed; bring one that was followed to its end."""
        if (pending := self._pending) is None:
            return
        if pending.proven or pending.written:
            with suppress(NonFiniteError):
                self.finish()
            return
        wait([pending.job])
        all_reduce_max(DONE)  # no rank writes into the draft any more
        self._pending = None
        if self.env.rank == 0:
            shutil.rmtree(pending.draft, ignore_errors=True)

    def _wait_for_writers(self) -> None:
        """Until every rank has written the save before, whose copies are then free."""
        if self._pending is not None and not self._pending.written:
            wait([self._pending.job])
            self._advance(may_publish=True)

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Have the thread do `work` after what it was given before, if that did not fail."""
        before = self._pending.job if self._pending is not None else None

        def job() -> Any:
            if before is not None:
                before.result()
            return work()

        return self._thread.submit(job)
