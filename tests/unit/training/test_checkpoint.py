from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.model.slices import KEPT_AVERAGES, open_checkpoint
from svd_ds.parallel.env import Env
from svd_ds.training.checkpoint import MARKER, CheckpointConfig, Checkpoints
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.objective import Objective
from svd_ds.training.state import Progress


class Adversary(Objective):
    """An objective that keeps something of its own."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([value])

    def loss(self, net: Any, batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch))

    def state(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.value = state["value"]


class OneRankEngine:
    """What a checkpoint asks of the engine, on one rank."""

    def __init__(self) -> None:
        self.shards = {"a": torch.randn(7), "b": torch.randn(3)}
        self.frozen = {"c": torch.randn(2)}

    def local_shards(self) -> dict[str, torch.Tensor]:
        return self.shards

    def frozen_shards(self) -> dict[str, torch.Tensor]:
        return self.frozen

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "state").write_text("optimiser")

    def load(self, folder: Path) -> None:
        assert (folder / "state").read_text() == "optimiser"


def checkpoints(folder: Path, **config: int) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**config), Env.read({}), "unet")


def progress(step: int) -> Progress:
    return Progress(Cursor(position=8 * step, fingerprint="f"), step=step, samples=8 * step)


def save(store: Checkpoints, step: int, engine: Any = None) -> ShardEMA:
    engine = engine or OneRankEngine()
    ema = ShardEMA(EMAConfig(lengths=(0.1,)), engine.local_shards())
    store.save(progress(step), engine, ema, Adversary(3.0), {"config.json": {"widths": [32]}})
    return ema


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), OneRankEngine()
    ema = save(store, 5, engine)
    saved = ema.shards("power-0.100")["a"].clone()
    ema.update({name: shard + 1 for name, shard in engine.shards.items()}, samples=8, batch=8)
    path = store.latest()
    assert path == tmp_path / "step-0000005"
    other = Adversary(0.0)
    assert store.load(path, engine, ema, other) == progress(5)  # type: ignore[arg-type]
    assert other.value.tolist() == [3.0]
    assert json.loads((path / "unet" / "config.json").read_text()) == {"widths": [32]}
    assert torch.equal(ema.shards("power-0.100")["a"], saved)
    weights = load_file(path / "unet" / "rank-00000-of-00001.safetensors")
    assert torch.equal(weights["b"], engine.shards["b"])
    assert torch.equal(weights["c"], engine.frozen["c"])
    averages = load_file(path / "ema-power-0.100" / "rank-00000-of-00001.safetensors")
    assert averages.keys() == {"a", "b"}, "what does not learn has no average"


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save(store, 1)
    (tmp_path / "step-0000002.tmp").mkdir()
    (tmp_path / "step-0000003").mkdir()
    assert list(store.complete()) == [1]
    save(store, 4)
    assert not (tmp_path / "step-0000002.tmp").exists(), "leftovers are cleared"


def test_a_failed_save_leaves_the_earlier_ones(tmp_path: Path) -> None:
    class FullDisk(OneRankEngine):
        def save(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    store = checkpoints(tmp_path)
    save(store, 1)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2, FullDisk())
    assert store.latest() == tmp_path / "step-0000001"


def test_old_ones_go_and_every_nth_stays(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        save(store, step)
    assert list(store.complete()) == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}" for step in (4, 6, 7)]


def test_averages_outlive_their_checkpoints(tmp_path: Path) -> None:
    store = checkpoints(tmp_path / "checkpoints", keep_last=1, keep_averages=2)
    for step in range(1, 6):
        save(store, step)
    kept = tmp_path / KEPT_AVERAGES
    assert sorted(path.name for path in kept.iterdir()) == ["step-0000002", "step-0000004"]
    assert sorted(path.name for path in (kept / "step-0000004").iterdir()) == [
        "ema-power-0.100",
        "state.json",
    ]
    assert list(store.complete()) == [5]
    _, pieces = open_checkpoint(store.latest(), "unet", "0.11")
    assert len(pieces["a"][0].parameters) == 3


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), OneRankEngine()
    save(store, 3, engine)
    written = (tmp_path / "step-0000003" / MARKER).stat().st_mtime_ns
    save(store, 3, engine)
    assert (tmp_path / "step-0000003" / MARKER).stat().st_mtime_ns == written


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    store, engine = checkpoints(tmp_path), OneRankEngine()
    ema = save(store, 1, engine)
    three = dataclasses.replace(store, env=dataclasses.replace(store.env, world=3))
    with pytest.raises(ValueError, match="saved by 1 ranks and this run has 3"):
        three.load(tmp_path / "step-0000001", engine, ema, Adversary(0.0))  # type: ignore[arg-type]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save(store, 1)
    path = tmp_path / "step-0000001"
    store.check_network(path)
    with pytest.raises(ValueError, match="is a checkpoint of a unet, and this run trains a decoder"):
        dataclasses.replace(store, network="decoder").check_network(path)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.every is 0 and checkpoint.keep_last 2"):
        CheckpointConfig(every=0)
