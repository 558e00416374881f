"""The benchmark of ZeRO-3's host cost: its network, and what it counts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_ds.model.unet import UNet

BENCH = Path(__file__).parents[4] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("zero3_host_cost")


def test_network_has_the_blocks_and_parameters_of_the_released_one(bench: Any) -> None:
    with torch.device("meta"):
        unet = UNet(bench.CONFIG)
    assert len(unet.blocks()) == 38
    assert len(list(unet.parameters())) == 1332


def test_time_of_gathers_is_kept_apart(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(number: int, *, group: str) -> tuple[int, str]:
        return sum(range(number)), group

    monkeypatch.setattr(bench.dist, "all_gather_into_tensor", gather)
    gathers = bench.TimedAllGather()
    assert gathers(1_000_000, group="all") == (499_999_500_000, "all")
    assert gathers.cpu > 0 and gathers.wall > 0
