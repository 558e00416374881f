"""A task that the machine cannot run is refused before its network is built."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.compose import compose
from svd_ds.model.ops import attention, fused
from svd_ds.tasks import read_task


def test_kernels_that_the_machine_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: Any = SimpleNamespace(conditioner="any")
    env: Any = SimpleNamespace(device=torch.device("cpu"))
    config = compose(["debug=tiny", "model.kernels=triton"])
    monkeypatch.setattr(fused, "triton_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "svd_ds.model.ops.kernels", SimpleNamespace(INTERPRETED=False))
    with pytest.raises(ValueError, match=r"model.kernels is triton, which needs a GPU, and this is a CPU"):
        read_task(config, env, inputs)


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (False, "flash_attn, which is not installed: choose auto or sdpa"),
        (True, "half precision on a GPU, not torch.float32 on a cpu device: choose auto or sdpa"),
    ],
)
@pytest.mark.parametrize("site", ["spatial_attention", "temporal_attention"])
def test_attention_that_the_machine_cannot_run_is_refused(
    site: str, installed: bool, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: Any = SimpleNamespace(conditioner="any", precision="fp32")
    env: Any = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(attention, "flash_attn_installed", lambda: installed)
    with pytest.raises(ValueError, match=sentence):
        read_task(compose(["debug=tiny", f"model.{site}=flash_attn"]), env, inputs)
