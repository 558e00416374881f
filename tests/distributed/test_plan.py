"""A run takes its micro-batch from the plan, and logs its planned and its measured memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from svd_ds import run as assembly
from svd_ds.config import RunConfig
from svd_ds.data.batching import BatchSplit
from svd_ds.parallel.env import Env
from svd_ds.plan import auto
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory_check import MemoryCheck
from tests.one_rank import start
from tests.profiles import make_profiles


def test_micro_batch_is_planned_and_memory_is_compared(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []

    def check(
        config: RunConfig, env: Env, split: BatchSplit, print_line: Callable[[str], None]
    ) -> MemoryCheck:
        splits.append(split)
        started = MemoryCheck(lambda: (7 * GIB, 8 * GIB), lambda: 9 * GIB, print_line)
        started._thread.join(60)
        return started

    monkeypatch.setattr(assembly, "profile_rank_steps", lambda env: make_profiles)
    monkeypatch.setattr(assembly, "start_memory_check", check)
    monkeypatch.setattr(auto, "available_memory", lambda: 40 * GIB)
    settings = ("batch.size=4", "batch.micro=auto")
    assert start(shards, tmp_path, "run.steps=3", *settings).step == 3
    assert splits == [BatchSplit(4, 1, (2,))]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["batch"] == {"size": 4, "micro": "auto"}
    log = (tmp_path / "logs/train.log").read_text()
    assert "batch.micro=auto: 2 of the 4 clips of a rank at once" in log
    assert "warning: memory: plan 7.0 GiB, measured 9.0 GiB" in log
    # With more memory the resumed run takes more clips at once.
    monkeypatch.setattr(auto, "available_memory", lambda: 400 * GIB)
    assert start(shards, tmp_path, "run.steps=4", *settings).step == 4
    assert splits[-1] == BatchSplit(4, 1, (4,))
