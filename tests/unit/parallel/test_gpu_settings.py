"""Process-wide settings of torch for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from svd_ds.parallel.gpu_settings import ALLOCATOR_VARIABLES, configure_allocator, configure_gpu

GPU = torch.device("cuda", 0)


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = flags()
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(
    ("deterministic", "fixed_shapes", "benchmark"),
    [(False, True, True), (False, False, False), (True, True, False), (True, False, False)],
)
def test_algorithms_are_timed_only_for_fixed_shapes_and_never_if_deterministic(
    deterministic: bool, fixed_shapes: bool, benchmark: bool
) -> None:
    configure_gpu(GPU, deterministic=deterministic, fixed_shapes=fixed_shapes, environ={})
    assert flags() == (benchmark, deterministic)


def test_deterministic_run_asks_torch_and_cublas_for_it_and_the_next_run_does_not() -> None:
    environ: dict[str, str] = {}
    configure_gpu(GPU, deterministic=True, fixed_shapes=True, environ=environ)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory, "a pass over memory for nothing"
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    configure_gpu(GPU, deterministic=False, fixed_shapes=True, environ=environ)
    assert not torch.are_deterministic_algorithms_enabled()


def test_workspace_of_the_user_is_kept() -> None:
    environ = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    configure_gpu(GPU, deterministic=True, fixed_shapes=True, environ=environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


def test_run_on_a_cpu_changes_nothing() -> None:
    before = flags()
    configure_gpu(torch.device("cpu"), deterministic=True, fixed_shapes=True)
    assert flags() == before and not torch.are_deterministic_algorithms_enabled()


def test_segments_of_the_allocator_grow() -> None:
    environ: dict[str, str] = {}
    configure_allocator(environ)
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_configuration_of_the_allocator_is_kept(name: str) -> None:
    environ = {name: "max_split_size_mb:512"}
    configure_allocator(environ)
    assert environ == {name: "max_split_size_mb:512"}
