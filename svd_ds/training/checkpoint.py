"""Crash-safe checkpoints: written under a temporary name, fsynced, then renamed.

    checkpoints/step-0000100/
        COMPLETE                manifest: size and checksum of every other file; a folder without it is not a
                                checkpoint
        state.json              Progress
        adam.json               number of steps that the optimiser has taken
        objective.safetensors   state of the objective (the discriminator), if it has any
        unet/config.json        UNetConfig, and lora.json if adapters are trained; decoder/ for task=decoder
        unet/rank-00000-of-00002.safetensors            this rank's shards of all weights, trained and frozen
        adam-exp_avg/... adam-exp_avg_sq/...            this rank's shards of the optimiser's moments
        ema-power-0.050/...                             this rank's shards of each average of trained weights

Shards are flat float32. Any number of ranks can load them; weights and averages can also be read without
DeepSpeed. weights/restarts.py defines complete, intact, valid and proven checkpoints.

A save has four stages; training waits only for the first.

1. Every rank copies its shards to host memory.
2. A thread of each rank writes the copy into the draft folder, fsyncs it, and computes the checksums. A value
   that is not finite aborts the save.
3. At the end of each step the ranks exchange the status of their threads. No thread waits for another rank,
   and all ranks learn of a failure at the same point. The ranks also wait until a step after the saved one
   was taken, not skipped by the guard: then the weights are proven.
4. Rank 0's thread then writes the manifest, renames the draft, and prunes old checkpoints.
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
from svd_ds.training.checkpoint_files import (
    NetworkSettings,
    num_valid_elements,
    rank_tensors,
    read_files,
    shared_files,
)
from svd_ds.training.draft import (
    DONE,
    NOT_FINITE,
    HostCopies,
    PendingSave,
    TensorFiles,
    save_status,
    write_draft,
)
from svd_ds.training.ema import ShardEMA
from svd_ds.training.objectives.base import Objective
from svd_ds.training.progress import Progress
from svd_ds.training.retention import CheckpointConfig, acquire, check_not_fenced, commit, draft_name
from svd_ds.training.verify import newest_intact_checkpoint
from svd_ds.weights.manifest import Manifest
from svd_ds.weights.restarts import complete_checkpoints
from svd_ds.weights.shards import checkpoint_network


class NonFiniteError(SharedError):
    """A save was aborted because a weight, an average or a moment is not finite; the message names it."""


class Checkpoints:
    """Checkpoints of one run, on one rank. As a context manager it finishes the pending save at its exit."""

    def __init__(self, folder: Path, config: CheckpointConfig, env: Env, network: str) -> None:
        """
        Args:
            network: the trained network, unet or decoder; also the name of the folder of its weights.
        """
        self.folder, self.config, self.env, self.network = folder, config, env, network
        self.token = ""
        """Fencing token of this restart; empty before `start_session`."""
        self._host = HostCopies(env.device)
        self._pending: PendingSave | None = None
        self._unproven: int | None = None
        """Step of the checkpoint that was loaded or committed last; None once a step after it was taken."""
        self._newest_proven = -1
        """Step of the newest proven checkpoint; -1 before there is one."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error on one rank no collective is possible: the pending save stays uncommitted.
        alone = kind is not None and not issubclass(kind, SharedError)
        try:
            if not alone:
                self.finish()
        finally:
            committing = self._pending is not None and self._pending.written
            self._thread.shutdown(wait=not alone or committing or self.env.world == 1)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, if any. Call it on one rank: others may find a newer one."""
        return next(reversed(complete_checkpoints(self.folder).values()), None)

    def check_network(self, path: Path) -> None:
        """Check that a checkpoint has the network that the run trains; raise ValueError if not."""
        network = checkpoint_network(path)
        if network != self.network:
            raise ValueError(f"{path} is a checkpoint of a {network}, and this run trains a {self.network}")

    def start_session(self, step: int, origin: str = "") -> None:
        """Acquire the run folder for this restart. All ranks call it, before they save.

        Args:
            step: step from which the run resumes; 0 for a new run.
            origin: checkpoint named by run.resume that this restart descends from; empty without one.

        Raises:
            SharedError: another restart acquires the folder at the same moment.
        """
        self.token = broadcast_from_rank0(lambda: acquire(self.folder, step, origin, restart_id()))

    def check_not_fenced(self) -> None:
        """Check that this restart still owns the run folder; raise ValueError if not."""
        check_not_fenced(self.folder, self.token)

    def is_fenced(self) -> bool:
        """Return True if another restart is known to have acquired the run folder."""
        try:
            if self.token:
                check_not_fenced(self.folder, self.token)
        except ValueError:
            return True
        except OSError:
            pass  # a failing file system does not mean that there is another restart
        return False

    def save(
        self,
        progress: Progress,
        engine: Engine,
        ema: ShardEMA,
        objective: Objective,
        settings: NetworkSettings,
    ) -> None:
        """Begin a checkpoint: copy the tensors to host memory, or write them with
        checkpoint.asynchronous=false.

        All ranks call it, after a taken step.

        Raises:
            SharedError: this checkpoint or the pending one cannot be written; earlier ones are kept.
            NonFiniteError: a value of this checkpoint or of the pending one is not finite.
        """
        self._note_taken()
        if self._pending is not None and not self._pending.written:
            # The host copies can be overwritten only after every rank has written them.
            wait([self._pending.job])
            self._advance(may_commit=True)
        tensors: TensorFiles = rank_tensors(self.network, self.env, engine, ema)
        texts: dict[str, str] = {}
        if self.env.rank == 0:
            shared, texts = shared_files(self.network, progress, engine, objective, settings)
            tensors = {**tensors, **shared}
        files = self._host.copy(tensors) if self.config.asynchronous else tensors
        draft = self.folder / draft_name(step_name(progress.step), self.token)
        num_valid = num_valid_elements(self.env, engine)
        job = self._submit(lambda: write_draft(draft, files, texts, num_valid))
        self._pending = PendingSave(progress.step, draft, job)
        if not self.config.asynchronous:
            wait([job])
            self._advance(may_commit=False)

    def poll_pending_save(self, taken: bool = True) -> None:
        """Advance the pending save by one stage if every rank is ready. All ranks call it, after each step.

        Args:
            taken: True if the step was taken, False if the guard skipped it. A save is committed only after a
                later step was taken.

        Raises:
            SharedError: a rank could not write; on all ranks.
            NonFiniteError: a rank's values are not finite; on all ranks.
        """
        if taken:
            self._note_taken()
        if self._pending is not None:
            self._advance(self._pending.proven)

    def finish(self) -> None:
        """Wait until the pending save is committed, even if no step was taken after it. All ranks call it.

        Raises:
            SharedError, NonFiniteError: as in `poll_pending_save`.
        """
        while self._pending is not None:
            wait([self._pending.job])
            self._advance(may_commit=True)

    def load(self, path: Path, engine: Engine, ema: ShardEMA, objective: Objective) -> Progress:
        """Load a checkpoint, saved by any number of ranks, and return its progress."""
        progress = read_files(path, self.network, self.env, engine, ema, objective)
        self._unproven = progress.step
        return progress

    def reload(self, engine: Engine, ema: ShardEMA, objective: Objective, reason: str) -> Progress:
        """Load the newest checkpoint that is intact and proven. All ranks call it.

        Newer checkpoints are renamed and kept. A pending save that is not proven is dropped.

        Args:
            reason: reason for the rollback, for the error.

        Raises:
            SharedError: the run has no checkpoint yet.
        """
        self._drop_unproven()
        path = newest_intact_checkpoint(self.folder, self.env, self.config.verify, self._is_proven)
        if path is None:
            raise SharedError(f"{reason}; {self.folder} has no checkpoint yet to roll back to")
        progress = self.load(path, engine, ema, objective)
        self._newest_proven = min(self._newest_proven, progress.step)
        return progress

    def _is_proven(self, step: int, manifest: Manifest) -> bool:
        return step <= self._newest_proven or manifest.proven

    def _note_taken(self) -> None:
        if self._unproven is not None:
            self._newest_proven, self._unproven = self._unproven, None
        if self._pending is not None:
            self._pending.proven = True

    def _advance(self, may_commit: bool) -> None:
        """Advance the pending save by one stage. All ranks call it, with the same argument."""
        pending = self._pending
        assert pending is not None
        status = all_reduce_max(save_status(pending.job))
        if status >= NOT_FINITE:
            self._abort(pending, status)
        elif status == DONE and pending.written:
            self._pending = None
        elif status == DONE and may_commit:
            digests = all_gather_objects([pending.job.result()])
            pending.written = True
            self._unproven = pending.step
            if pending.proven:
                self._note_taken()
            files = {name: digest for rank_files in digests for name, digest in rank_files.items()}
            manifest = Manifest(self.token, len(digests), pending.proven, files)
            proven = self._newest_proven
            if self.env.rank == 0:
                pending.job = self._submit(lambda: commit(pending.draft, manifest, self.config, proven))

    def _abort(self, pending: PendingSave, status: int) -> None:
        self._pending = None
        try:
            # A later restart removes our drafts: report that it owns the folder, and not a failing disk.
            broadcast_from_rank0(lambda: check_not_fenced(self.folder, self.token))
            try:
                raise_on_all_ranks(pending.job.result)
            except SharedError as error:
                if status == NOT_FINITE:
                    raise NonFiniteError(str(error)) from None
                raise
        finally:
            if self.env.rank == 0:
                shutil.rmtree(pending.draft, ignore_errors=True)

    def _drop_unproven(self) -> None:
        """Drop the pending save if it is not proven, else finish it."""
        if (pending := self._pending) is None:
            return
        if pending.proven or pending.written:
            with suppress(NonFiniteError):
                self.finish()
            return
        wait([pending.job])
        all_reduce_max(DONE)  # a barrier: no rank writes into the draft any more
        self._pending = None
        if self.env.rank == 0:
            shutil.rmtree(pending.draft, ignore_errors=True)

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` in the thread after the previous job; if that job failed, fail with the same error."""
        previous = self._pending.job if self._pending is not None else None

        def job() -> Any:
            if previous is not None:
                previous.result()
            return work()

        return self._thread.submit(job)
