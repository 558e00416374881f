"""A task is refused before its network is made where the machine cannot run it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.config import compose
from svd_ds.model import fused
from svd_ds.tasks import read_task


def test_kernels_that_the_machine_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: Any = SimpleNamespace(conditioner="any")
    env: Any = SimpleNamespace(device=torch.device("cpu"))
    config = compose(["debug=tiny", "model.kernels=triton"])
    monkeypatch.setattr(fused, "triton_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "svd_ds.model.kernels", SimpleNamespace(INTERPRETED=False))
    with pytest.raises(ValueError, match=r"model.kernels is triton, which runs on a GPU, and this is a CPU"):
        read_task(config, env, inputs)
