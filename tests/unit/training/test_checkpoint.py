"""Checkpoints: asynchronous saves, pruning, fencing of stale processes, and loading on other ranks."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.env import Env
from svd_ds.training import draft as drafts
from svd_ds.training import retention
from svd_ds.training.checkpoint import Checkpoints, NonFiniteError
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.objectives.base import Objective
from svd_ds.training.progress import Progress
from svd_ds.training.retention import CheckpointConfig, commit, draft_name
from svd_ds.weights.manifest import Manifest, read_manifest
from svd_ds.weights.restarts import complete_checkpoints, read_acquired_restarts
from svd_ds.weights.shards import KEPT_AVERAGES, open_checkpoint

SHAPES = {"a": torch.Size((7,)), "b": torch.Size((1, 3)), "c": torch.Size((2,))}
TRAINED = ("a", "b")


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class StatefulObjective(Objective):
    """Objective with a state."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([value])

    def draw(self, batch: Batch) -> Batch:
        return batch

    def loss(self, net: Any, batch: Batch) -> Tensor:
        return torch.zeros(len(batch))

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.value = state["value"]


class Shards:
    """Stub of the engine, with everything that a checkpoint needs of it."""

    def __init__(self, world: int = 1) -> None:
        self.shapes, self.updates = SHAPES, 7
        self.weights = {name: torch.randn(-(-shape.numel() // world)) for name, shape in SHAPES.items()}
        self.adam = {
            moment: {name: torch.randn_like(self.weights[name]) for name in TRAINED}
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def local_shards(self) -> dict[str, Tensor]:
        return {name: self.weights[name] for name in TRAINED}

    def frozen_shards(self) -> dict[str, Tensor]:
        return {"c": self.weights["c"]}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return self.adam

    def load_shards(self, shards: Iterable[tuple[str, Tensor]]) -> list[str]:
        self.weights |= dict(shards)
        return []


def checkpoints(folder: Path, start_session: int | None = 0, **config: Any) -> Checkpoints:
    """Checkpoints of a run on one rank that is restarted after step `start_session`."""
    store = Checkpoints(folder, CheckpointConfig(**config), Env.read({}), "unet")
    folder.mkdir(parents=True, exist_ok=True)
    if start_session is not None:
        store.start_session(start_session)
    return store


def progress(step: int) -> Progress:
    return Progress(Cursor(next_ordinal=8 * step, fingerprint="f"), step=step, samples=8 * step)


def begin_save(store: Checkpoints, step: int, engine: Any = None) -> ShardEMA:
    engine = engine or Shards()
    ema = ShardEMA(EMAConfig(lengths=(0.1,)), engine.local_shards())
    store.save(progress(step), engine, ema, StatefulObjective(3.0), {"config.json": {"widths": [32]}})
    return ema


def save(store: Checkpoints, step: int, engine: Any = None) -> ShardEMA:
    """Save a checkpoint, after which a step is taken."""
    ema = begin_save(store, step, engine)
    store.poll_pending_save(taken=True)
    store.finish()
    return ema


@pytest.mark.parametrize("asynchronous", [True, False])
def test_save_and_load_round_trip(folder: Path, asynchronous: bool) -> None:
    store, engine = checkpoints(folder, asynchronous=asynchronous), Shards()
    ema = save(store, 5, engine)
    path = store.latest()
    assert path == folder / "step-0000005"
    assert json.loads((path / "unet" / "config.json").read_text()) == {"widths": [32]}
    assert load_file(path / "ema-power-0.100" / "rank-00000-of-00001.safetensors").keys() == {"a", "b"}, (
        "frozen parameters have no average"
    )

    other, objective = Shards(), StatefulObjective(0.0)
    other.updates = 0
    average = ShardEMA(EMAConfig(lengths=(0.1,)), other.local_shards())
    assert store.load(path, other, average, objective) == progress(5)  # type: ignore[arg-type]
    assert objective.value.tolist() == [3.0]
    assert other.updates == 7
    for theirs, ours in (
        (other.weights, engine.weights),
        *((other.adam[moment], engine.adam[moment]) for moment in engine.adam),
        (average.shards("power-0.100"), ema.shards("power-0.100")),
    ):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_checkpoint_loads_on_another_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """Three ranks write; some of the reading ranks have only padding of the small tensors."""
    full = {name: torch.arange(1.0, 1 + shape.numel()) for name, shape in SHAPES.items()}

    def shards(rank: int, world: int) -> Shards:
        engine = Shards(world)
        for name, values in full.items():
            n = len(engine.weights[name])
            padded = torch.cat([values, torch.zeros(n * world - len(values))])
            engine.weights[name].copy_(padded[rank * n : (rank + 1) * n])
        for k, moment in enumerate(engine.adam.values(), start=2):
            for name in TRAINED:
                moment[name].copy_(k * engine.weights[name])
        return engine

    writers = [checkpoints(tmp_path / "written")]
    writers += [
        Checkpoints(tmp_path / "written", writers[0].config, writers[0].env, "unet") for _ in range(2)
    ]
    for rank in (1, 2, 0):
        writers[rank].env = replace(writers[rank].env, rank=rank, world=3)
        writers[rank].token = writers[0].token
        begin_save(writers[rank], 4, shards(rank, 3))
        writers[rank]._thread.shutdown()
    draft = tmp_path / "written" / draft_name("step-0000004", writers[0].token)
    files = {name: digest for writer in writers for name, digest in writer._pending.job.result().items()}
    commit(draft, Manifest(writers[0].token, 3, True, files), writers[0].config, 4)

    for rank in range(ranks):
        reader = Checkpoints(
            tmp_path / "written",
            CheckpointConfig(),
            replace(Env.read({}), rank=rank, world=ranks),
            "unet",
        )
        engine, wanted = Shards(ranks), shards(rank, ranks)
        ema = ShardEMA(EMAConfig(lengths=(0.1,)), engine.local_shards())
        path = reader.latest()
        assert path is not None
        reader.load(path, engine, ema, StatefulObjective(0.0))  # type: ignore[arg-type]
        for name in SHAPES:
            assert torch.equal(engine.weights[name], wanted.weights[name]), (rank, name)
        for name in TRAINED:
            assert torch.equal(ema.shards("power-0.100")[name], wanted.weights[name]), (rank, name)
            for moment in engine.adam:
                assert torch.equal(engine.adam[moment][name], wanted.adam[moment][name]), (rank, name)


def test_training_continues_while_a_checkpoint_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later changes are not in the checkpoint, and it is incomplete until everything is written."""
    disk, write = threading.Event(), drafts.write_tensors
    monkeypatch.setattr(drafts, "write_tensors", lambda *args: disk.wait() and write(*args))
    store, engine = checkpoints(folder), Shards()
    wanted = {name: values.clone() for name, values in engine.weights.items()}
    begin_save(store, 5, engine)
    for values in engine.weights.values():
        values.zero_()
    store.poll_pending_save()
    assert store.latest() is None
    disk.set()
    store.finish()
    saved = load_file(folder / "step-0000005/unet/rank-00000-of-00001.safetensors")
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_end_of_the_run_waits_for_the_pending_save(folder: Path) -> None:
    with checkpoints(folder, start_session=0) as store:
        begin_save(store, 1)
    assert store.latest() == folder / "step-0000001"
    with pytest.raises(SharedError, match="all ranks know"), checkpoints(folder, start_session=1) as store:
        begin_save(store, 2)
        raise SharedError("all ranks know")
    assert store.latest() == folder / "step-0000002"


def test_incomplete_checkpoints_are_ignored(folder: Path) -> None:
    (folder / "step-0000002.0123.tmp").mkdir()
    (folder / "step-0000003").mkdir()
    store = checkpoints(folder)
    save(store, 1)
    assert list(complete_checkpoints(folder)) == [1]
    save(store, 3)
    assert list(complete_checkpoints(folder)) == [1, 3]
    assert not list(folder.glob("*.tmp")), "leftovers are cleared"


def test_full_disk_fails_the_save_and_keeps_earlier_checkpoints(folder: Path) -> None:
    store = checkpoints(folder)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(SharedError, match=r"the checkpoint .*step-0000002.* cannot be written: .*large"):
            save(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.latest() == folder / "step-0000001"
    assert not list(folder.glob("*.tmp")), "the draft is removed"
    save(store, 3)
    assert store.latest() == folder / "step-0000003"


@pytest.mark.parametrize("moment", ["before the draft", "before the renaming"])
def test_two_restarts_at_the_same_moment_leave_one_owner(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Checkpoints] = []
    name = "write_text" if moment == "before the draft" else "replace_file"
    real = getattr(retention, name)

    def second_restart_comes_first(*arguments: Any) -> None:
        if not others:
            others.append(checkpoints(folder, start_session=None))
            others[0].start_session(0)
        real(*arguments)

    monkeypatch.setattr(retention, name, second_restart_comes_first)
    first = checkpoints(folder, start_session=None)
    try:
        first.start_session(0)
    except SharedError as error:
        assert "another restart of this run has taken over" in str(error)
    owners = [store for store in (first, *others) if store.token and not store.is_fenced()]
    assert len(owners) == 1
    save(owners[0], 2)
    assert owners[0].latest() == folder / "step-0000002"
    monkeypatch.undo()
    checkpoints(folder, start_session=2)
    assert [path.name for path in folder.iterdir()] == ["step-0000002"]


def test_next_save_reports_that_the_previous_one_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = checkpoints(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drafts, "write_tensors", full)
    begin_save(store, 1)
    with pytest.raises(SharedError, match="No space left on device"):
        begin_save(store, 2)


def test_old_checkpoints_are_pruned_and_every_nth_is_kept(folder: Path) -> None:
    store = checkpoints(folder, keep_last=2, keep_every=4)
    for step in range(1, 8):
        begin_save(store, step)
    store.finish()
    assert list(complete_checkpoints(folder)) == [4, 6, 7]
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-000000{step}" for step in (4, 6, 7)]


def test_averages_of_pruned_checkpoints_are_kept(tmp_path: Path) -> None:
    store = checkpoints(tmp_path / "checkpoints", keep_last=1, keep_averages=2)
    for step in range(1, 6):
        save(store, step)
    kept = tmp_path / KEPT_AVERAGES
    assert sorted(path.name for path in kept.iterdir()) == ["step-0000002", "step-0000004"]
    assert sorted(path.name for path in (kept / "step-0000004").iterdir()) == [
        "COMPLETE",
        "ema-power-0.100",
        "state.json",
    ]
    newest = store.latest()
    assert newest is not None
    _, pieces = open_checkpoint(newest, "unet", "0.11")
    assert len(pieces["a"][0].parameters) == 3


@pytest.mark.parametrize("removed", range(3))
def test_interrupted_prune_loses_no_averages(
    removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prune is interrupted after it removed `removed` folders."""
    store = checkpoints(tmp_path / "checkpoints", keep_last=1, keep_averages=2)
    for step in (1, 2):
        save(store, step)
    left, remove = iter(range(removed)), shutil.rmtree

    def cut(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(left)  # raises when there are no more
            remove(path)

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(StopIteration):
        save(store, 3)
    monkeypatch.undo()
    checkpoints(tmp_path / "checkpoints", start_session=3)
    assert list(complete_checkpoints(tmp_path / "checkpoints")) == [3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]
    kept = tmp_path / KEPT_AVERAGES / "step-0000002"
    assert sorted(path.name for path in kept.iterdir()) == ["COMPLETE", "ema-power-0.100", "state.json"]


def test_stale_process_cannot_overwrite_checkpoint(folder: Path) -> None:
    old = checkpoints(folder)
    save(old, 4)
    begin_save(old, 6)
    new = checkpoints(folder, start_session=4)
    with pytest.raises(SharedError, match="another restart of this run has taken over"):
        old.finish()
    assert new.latest() == folder / "step-0000004", "it was committed before the restart"
    begin_save(new, 6)
    with pytest.raises(SharedError, match="another restart of this run has taken over"):
        save(old, 8)
    new.finish()
    assert new.latest() == folder / "step-0000006"
    assert read_manifest(folder / "step-0000006").token == read_acquired_restarts(folder)[1].token


def test_checkpoint_of_a_stale_process_is_not_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new restart began between the fencing check of the old one and its renaming."""
    old = checkpoints(folder)
    save(old, 4)
    before = read_acquired_restarts(folder)
    new = checkpoints(folder, start_session=4)
    monkeypatch.setattr(retention, "read_acquired_restarts", lambda _: before)
    save(old, 6)
    monkeypatch.undo()
    assert (folder / "step-0000006/COMPLETE").exists()
    assert new.latest() == folder / "step-0000004"
    save(new, 6)
    assert new.latest() == folder / "step-0000006", "the checkpoint of the new restart replaces it"
    assert checkpoints(folder, start_session=6).latest() == folder / "step-0000006"


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "not cleared"])
@pytest.mark.parametrize("num_checks", [1, 2, 3])
def test_stale_process_that_wakes_after_a_check_removes_nothing_of_the_next_restart(
    num_checks: int, cleared: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was cut off after its `num_checks`-th fencing check, and comes back when the next restart has
    saved the same step. A draft that its own node holds open may not be cleared."""
    first = checkpoints(folder)
    save(first, 4)
    save(first, 6)
    old = checkpoints(folder, start_session=4)
    begin_save(old, 6)
    old._thread.shutdown()
    manifest = Manifest(old.token, 1, True, old._pending.job.result())
    checks, restarts = [], []

    def freeze(folder: Path, token: str) -> None:
        check(folder, token)
        checks.extend([token] if token == old.token else [])
        if len(checks) == num_checks and not restarts:
            restarts.append(checkpoints(folder, start_session=4))
            save(restarts[0], 6)

    check = retention.check_not_fenced
    monkeypatch.setattr(retention, "check_not_fenced", freeze)
    if not cleared:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises((ValueError, OSError)):
        commit(folder / draft_name("step-0000006", old.token), manifest, old.config, 6)
    (new,) = restarts
    assert new.latest() == folder / "step-0000006"
    assert read_manifest(folder / "step-0000006").token == new.token != old.token
    assert (folder / "step-0000006/unet/rank-00000-of-00001.safetensors").exists()


def test_run_resumed_from_an_earlier_step_ignores_later_checkpoints(folder: Path) -> None:
    first = checkpoints(folder, keep_last=5)
    for step in (2, 4, 6):
        save(first, step)
    back = checkpoints(folder, start_session=2, keep_last=5)
    assert back.latest() == folder / "step-0000002"
    save(back, 4)
    assert list(complete_checkpoints(folder)) == [2, 4]


def test_checkpoint_of_another_network_is_refused(folder: Path) -> None:
    store = checkpoints(folder)
    save(store, 1)
    path = folder / "step-0000001"
    store.check_network(path)
    store.network = "decoder"
    with pytest.raises(ValueError, match="is a checkpoint of a unet, and this run trains a decoder"):
        store.check_network(path)


def test_checkpoint_of_other_widths_is_refused_with_both_numbers(folder: Path) -> None:
    store = checkpoints(folder)
    ema = save(store, 1)
    for shapes, message in (
        ({**SHAPES, "a": torch.Size((9,))}, "has 7 elements of a: for this run's network it must have 9"),
        ({**SHAPES, "d": torch.Size((1,))}, "lacks d, which this run's network has"),
    ):
        engine = Shards()
        engine.shapes = shapes
        with pytest.raises(ValueError, match=message):
            store.load(folder / "step-0000001", engine, ema, StatefulObjective(0.0))  # type: ignore[arg-type]


def test_config_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.every is 0: it must be at least 1"):
        CheckpointConfig(every=0)
    with pytest.raises(ValueError, match=r"checkpoint.keep_every is -1: it must be at least 0"):
        CheckpointConfig(keep_every=-1)


def test_checkpoint_with_a_non_finite_value_is_never_committed(folder: Path) -> None:
    store, engine = checkpoints(folder), Shards()
    save(store, 1, engine)
    engine.adam["exp_avg"]["a"][2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"a in adam-exp_avg/.* is not finite"):
        save(store, 2, engine)
    assert store.latest() == folder / "step-0000001"
    assert not list(folder.glob("*.tmp"))


def test_rollback_ignores_a_save_after_which_no_step_was_taken(folder: Path) -> None:
    store, engine = checkpoints(folder), Shards()
    ema = save(store, 1, engine)
    begin_save(store, 2, engine)
    store.poll_pending_save(taken=False)
    found = store.reload(engine, ema, StatefulObjective(0.0), "skipped")  # type: ignore[arg-type]
    assert found.step == 1
    assert list(complete_checkpoints(folder)) == [1]


def test_unproven_checkpoint_prunes_nothing(folder: Path) -> None:
    store = checkpoints(folder, keep_last=1)
    save(store, 1)
    begin_save(store, 2)
    store.finish()
    assert list(complete_checkpoints(folder)) == [1, 2]


@pytest.mark.parametrize(
    ("world", "written", "waits"), [(1, False, True), (2, False, False), (2, True, True)]
)
def test_rank_that_fails_alone_waits_only_for_its_commit(
    tmp_path: Path, world: int, written: bool, waits: bool
) -> None:
    """A save that other ranks may not have written is lost with the rank; a hanging disk must not hold it."""
    store = checkpoints(tmp_path)
    store.env = replace(store.env, world=world)
    release = threading.Event()
    job = store._submit(release.wait)
    store._pending = drafts.PendingSave(1, tmp_path / "draft", job, proven=True, written=written)
    if waits:
        threading.Timer(0.2, release.set).start()
    with pytest.raises(KeyError), store:
        raise KeyError("bug")
    assert job.done() == waits
    release.set()
