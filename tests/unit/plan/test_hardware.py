"""Table of GPUs: the same peaks as the MFU's, found by the driver's name; calibrations and the host's law."""

from __future__ import annotations

import pytest

from svd_ds.plan.hardware import (
    GPUS,
    HOST_LAWS,
    Calibration,
    Cluster,
    calibration_factor,
    find_gpu,
    match_gpu,
)
from svd_ds.training.usage import PEAK_FLOPS

MEASURED_HOST_S = [
    (True, 2, 0.409), (True, 64, 0.382), (True, 384, 0.369), (True, 1024, 0.447),
    (False, 2, 0.470), (False, 64, 1.247), (False, 384, 4.544), (False, 1024, 11.005)
]  # fmt: skip
"""parallel.fast_host_loops, ranks, seconds: the table of docs/benchmarks.md."""


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_numbers_of_a_gpu_are_plausible(gpu) -> None:
    assert GPUS[gpu.name] is gpu and gpu.source
    assert gpu.bf16_flops >= gpu.tf32_flops >= gpu.fp32_flops > 1e12
    assert 20 < gpu.memory_gib < 200 and 5e11 < gpu.bandwidth < 1e13
    assert all(0 < share <= 1 for share in vars(gpu.shares).values())
    if gpu.part in PEAK_FLOPS:
        assert gpu.bf16_flops == PEAK_FLOPS[gpu.part], "the MFU is planned and measured against one peak"


def test_every_gpu_of_the_mfu_can_be_planned_for() -> None:
    assert set(PEAK_FLOPS) <= {gpu.part for gpu in GPUS.values()}


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 80.0, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "a100-40"),
        ("NVIDIA A800-SXM4-80GB", 80.0, "a800"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA GeForce RTX 4090", 24.0, "4090"),
        ("NVIDIA RTX A6000", 48.0, "a6000"),
    ],
)
def test_gpu_is_found_by_the_name_of_the_driver(name: str, memory_gib: float, expected: str) -> None:
    gpu = match_gpu(name, memory_gib)
    assert gpu is not None and gpu.name == expected


def test_unknown_gpus() -> None:
    assert match_gpu("Tesla V100-SXM2-32GB", 32.0) is None
    with pytest.raises(ValueError, match=r"--gpu is v100: it must be one of a100-80, .*, 3090"):
        find_gpu("v100")


def test_fp32_uses_tf32_for_convolutions_alone() -> None:
    gpu = GPUS["a100-80"]
    assert gpu.peak_flops("conv", "fp32") == 156e12
    assert gpu.peak_flops("matmul", "fp32") == 19.5e12
    assert gpu.peak_flops("matmul", "bf16") == 312e12


def test_calibrations_of_a_gpu_multiply_its_times() -> None:
    gpu = GPUS["a100-80"]
    measured = [
        Calibration("a100-80", 1.0, 2.0, "one"),
        Calibration("a100-80", 1.0, 8.0, "two"),
        Calibration("h100-80", 1.0, 100.0, "another GPU"),
    ]
    assert calibration_factor(gpu, measured) == pytest.approx(4.0)
    assert calibration_factor(gpu, measured[2:]) == 1.0


def test_cluster_with_a_partly_used_node() -> None:
    gpu = GPUS["4090"]
    assert (Cluster(gpu, 12, 8, 1e9).nodes, Cluster(gpu, 12, 8, 1e9).ranks_per_node) == (2, 8)
    assert (Cluster(gpu, 4, 8, 1e9).nodes, Cluster(gpu, 4, 8, 1e9).ranks_per_node) == (1, 4)


@pytest.mark.parametrize(("fast", "ranks", "measured_s"), MEASURED_HOST_S)
def test_host_laws_are_those_of_the_benchmark(fast: bool, ranks: int, measured_s: float) -> None:
    """The benchmark's times are good to some 20 %."""
    law = HOST_LAWS[fast]
    assert law.seconds(law.tensors, ranks) == pytest.approx(measured_s, rel=0.2)
    assert law.seconds(2 * law.tensors, ranks) == pytest.approx(2 * law.seconds(law.tensors, ranks))
