"""The training step on fake CUDA tensors: all tensors are on the GPU, and the host waits for it once a step.

It is the project's own step: batch, draws, CLIP, VAE, conditioner, network, loss, backward pass with
recomputation, AdamW and averages, with Triton's wrappers.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu_path.run_steps import CASES
from tests.gpu_path.steps import needs_compiler, run_steps

pytestmark = needs_compiler
STEPS = [f"{name}/{policy}" for name, (_, policies) in CASES.items() for policy in policies]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_steps([*CASES])


@pytest.mark.parametrize("step", STEPS)
def test_step_mixes_no_devices_and_waits_for_the_gpu_once(step: str, seen: dict[str, Any]) -> None:
    found = seen[step]
    assert found["device_errors"] == []
    assert found["blocking_copies"] == []
    assert found["host_operands"] == []
    (read,) = found["host_reads"]
    assert read.startswith("svd_ds/training/gradients.py:")


@pytest.mark.parametrize("step", STEPS)
def test_every_phase_has_run(step: str, seen: dict[str, Any]) -> None:
    launches = seen[step]["launches"]
    assert launches["forward"] > 100
    assert launches["backward"] > launches["forward"] or step.startswith("lora/none")
    assert launches["encoders"] > 10 and launches["optimiser"] > 3


def test_recomputation_keeps_less(seen: dict[str, Any]) -> None:
    for name in ("image", "text", "lora"):
        kept = {policy: seen[f"{name}/{policy}"]["kept"] for policy in CASES[name][1]}
        assert kept["full"] < kept["blocks"] < kept["attention"] < kept["none"]


def test_triton_kernels_take_fewer_launches_than_torch(seen: dict[str, Any]) -> None:
    for phase in ("forward", "backward"):
        assert seen["image/blocks"]["launches"][phase] < seen["torch/blocks"]["launches"][phase]
