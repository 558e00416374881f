"""Memory that runs out before the first step: what the user is told, and when the node is to blame."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
import torch.distributed as dist

from svd_ds.compose import compose
from svd_ds.jobs.out_of_memory import GIB, LEAST_MEMORY, OWN_GIB, explain_out_of_memory, is_out_of_memory
from svd_ds.parallel.env import host

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has a total capacity of 79.15 GiB of which "
    "12.38 GiB is free. Including non-PyTorch memory, this process has 66.77 GiB memory in use."
)
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
NCCL = dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'")
SETTINGS = {
    "batch.micro": None,
    "recompute": "blocks",
    "frozen.chunk": 14,
    "parallel.offload_optimizer": False,
    "checkpoint.asynchronous": True,
}
UseGPU = Callable[[float, float, float], None]


@pytest.fixture
def use_gpu(monkeypatch: pytest.MonkeyPatch) -> UseGPU:
    """use_gpu(free, total, own) fakes the numbers of a GPU, in GiB; `own` is what torch's allocator holds."""

    def use(free: float, total: float, own: float) -> None:
        numbers = int(free * GIB), int(total * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: numbers)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(own * GIB))

    return use


def host_error() -> RuntimeError:
    """The error of torch's own allocator on a CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 52, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize("error", [CUDA, CUBLAS, NCCL, host_error()], ids=["torch", "cublas", "nccl", "host"])
def test_errors_of_memory_are_known_by_their_own_words(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of memory"),
        ValueError(str(CUDA)),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        MemoryError(),
    ],
)
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert explain_out_of_memory(error, GPU, SETTINGS) is None


def test_sentence_has_the_numbers_and_the_settings_that_need_less(use_gpu: UseGPU) -> None:
    use_gpu(12.38, 79.15, 66.0)
    found = explain_out_of_memory(CUDA, GPU, SETTINGS)
    assert type(found) is ValueError
    assert str(found) == (
        "out of GPU memory before the first step is complete: 20.00 GiB more do not fit into the 79.15 GiB "
        "of cuda:3; batch.micro=1 (now null), recompute=full (now blocks), frozen.chunk=1 (now 14), "
        "parallel.offload_optimizer=true (now false), or more ranks need less"
    )


@pytest.mark.parametrize("error", [CUBLAS, NCCL])
def test_library_s_error_has_the_size_of_the_gpu(use_gpu: UseGPU, error: RuntimeError) -> None:
    use_gpu(0.1, 79.15, 77.0)
    found = explain_out_of_memory(error, GPU, dict(LEAST_MEMORY))
    assert str(found) == (
        "out of GPU memory before the first step is complete: the buffers of a library do not fit into the "
        "79.15 GiB of cuda:3; only more ranks need less"
    )


def test_gpu_that_cannot_be_asked_is_explained_by_torch_s_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert "20.00 GiB more do not fit into the 79.15 GiB of cuda:3" in str(
        explain_out_of_memory(CUDA, GPU, SETTINGS)
    )


def test_host_memory_is_not_the_gpu_s(use_gpu: UseGPU) -> None:
    use_gpu(0.0, 80.0, 0.0)
    for device in (CPU, GPU):
        found = explain_out_of_memory(host_error(), device, SETTINGS)
        assert type(found) is ValueError
        assert str(found).startswith(
            "out of host memory before the first step is complete: 4194304.00 GiB more do not fit into this "
            "machine; batch.micro=1 "
        )
        assert "checkpoint.asynchronous=false (now true)" in str(found) and "offload" not in str(found)


@pytest.mark.parametrize(("foreign", "retryable"), [(OWN_GIB - 1, False), (OWN_GIB + 1, True), (31.2, True)])
def test_memory_that_other_processes_hold_is_the_fault_of_the_node(
    use_gpu: UseGPU, foreign: float, retryable: bool
) -> None:
    use_gpu(0.5, 80.0, 79.5 - foreign)
    found = explain_out_of_memory(CUDA, GPU, SETTINGS)
    assert isinstance(found, OSError) == retryable
    if retryable:
        assert str(found) == (
            f"out of GPU memory on {host()} before the first step is complete: other processes hold "
            f"{foreign:.1f} of the 80.0 GiB of cuda:3"
        )


def test_every_setting_is_a_key_that_takes_its_value() -> None:
    words = {True: "true", False: "false"}
    overrides = [
        f"{key}={words.get(value, value) if isinstance(value, bool) else value}"
        for key, value in LEAST_MEMORY.items()
    ]
    config = compose(["debug=tiny", *overrides])
    assert {key: attrgetter(key)(config) for key in LEAST_MEMORY} == dict(LEAST_MEMORY)
