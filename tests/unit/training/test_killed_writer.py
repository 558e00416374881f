"""A process that is killed before any file operation of a save loses no complete checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from svd_ds import fsync_io
from svd_ds.parallel.env import Env
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.retention import CheckpointConfig
from svd_ds.training.verify import newest_intact_checkpoint
from svd_ds.weights.manifest import check_checkpoint
from tests.forked import fork_server
from tests.unit.training.test_checkpoint import Shards, StatefulObjective, progress

KILLED = 77
"""Exit code of a killed writer."""
CONFIG = CheckpointConfig(keep_last=1, keep_averages=2)
WATCHED = ("fsync", "replace", "unlink", "rmdir", "mkdir")
"""Functions of os whose calls count as operations."""


def save(folder: Path, begin: int, step: int) -> None:
    """Restart the run after step `begin`, and save one checkpoint whose weights are all `step`."""
    engine, objective = Shards(), StatefulObjective(float(step))
    for values in (engine.weights, *engine.adam.values()):
        for value in values.values():
            value.fill_(step)
    ema = ShardEMA(EMAConfig(lengths=(0.1,)), engine.local_shards())
    with Checkpoints(folder, CONFIG, Env.read({}), "unet") as store:
        store.start_session(begin)
        store.save(progress(step), engine, ema, objective, {"config.json": {}})  # type: ignore[arg-type]
        store.poll_pending_save(taken=True)


def load(path: Path) -> tuple[int, set[float]]:
    """Return the step of a checkpoint, and the values in it."""
    engine, objective = Shards(), StatefulObjective(0.0)
    ema = ShardEMA(EMAConfig(lengths=(0.1,)), engine.local_shards())
    store = Checkpoints(path.parent, CONFIG, Env.read({}), "unet")
    loaded = store.load(path, engine, ema, objective)  # type: ignore[arg-type]
    tensors = [*engine.weights.values(), *ema.shards("power-0.100").values(), objective.value]
    tensors += [value for moment in engine.adam.values() for value in moment.values()]
    return loaded.step, {float(value) for tensor in tensors for value in tensor}


def killed_save(folder: Path, begin: int, step: int, operation: int) -> None:
    """Call `save` in a process that exits before its n-th file operation, or half way through it."""
    left = iter(range(operation))

    def count() -> None:
        if next(left, None) is None:
            os._exit(KILLED)

    for name in WATCHED:
        real = getattr(os, name)
        setattr(os, name, lambda *args, real=real, **kwargs: (count(), real(*args, **kwargs))[1])
    sys.addaudithook(lambda event, args: count() if event == "open" and "w" in str(args[1]) else None)
    real_save = fsync_io.save_file

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if next(left, None) is None:
            real_save(tensors, path, metadata)
            os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)
        real_save(tensors, path, metadata)

    fsync_io.save_file = save_file
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(folder, begin, step)
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def server() -> Any:
    return fork_server()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder with kept averages of step 2, and a checkpoint of step 3 that the next one prunes."""
    run = tmp_path_factory.mktemp("killed") / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (2, 3):
        save(run / "checkpoints", step - 1, step)
    return run


def end_and_resume(server: Any, base: Path, run: Path, operation: int) -> bool:
    """Kill a save of step 4 before its n-th operation, and resume; return True if it was killed."""
    shutil.copytree(base, run)
    folder = run / "checkpoints"
    writer = server.Process(target=killed_save, args=(folder, 3, 4, operation))
    writer.start()
    writer.join(60)
    assert writer.exitcode in (0, KILLED), (operation, writer.exitcode)

    newest = newest_intact_checkpoint(folder, Env.read({}), checksums=True)
    assert newest is not None, operation
    step, values = load(newest)
    assert step in (3, 4) and values == {float(step)}, (operation, step, values)
    save(folder, step, step + 1)
    newest = newest_intact_checkpoint(folder, Env.read({}), checksums=True)
    assert newest is not None and load(newest) == (step + 1, {float(step + 1)}), operation
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    assert left == {newest.name}, f"{operation}: incomplete folders are removed"
    averages = sorted((run / "averages").iterdir())
    assert "step-0000002" in {kept.name for kept in averages}, f"{operation}: averages are lost"
    for kept in averages:
        check_checkpoint(kept, ["state.json", "ema-power-0.100/rank-00000-of-00001.safetensors"])
    shutil.rmtree(run)
    return writer.exitcode == KILLED


@pytest.mark.parametrize("operation", [0, 9, 28])
def test_killed_save_loses_nothing(server: Any, base: Path, tmp_path: Path, operation: int) -> None:
    assert end_and_resume(server, base, tmp_path / "run", operation)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_save_killed_before_any_operation_loses_nothing(server: Any, base: Path, tmp_path: Path) -> None:
    operation = 0
    while end_and_resume(server, base, tmp_path / "run", operation):
        operation += 1
    assert operation > 40, "each file is opened and synced, each folder synced"
