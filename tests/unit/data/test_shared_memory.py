"""Need of the data workers for shared memory, and its refusal where a machine has too little."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from svd_ds.data.config import DataConfig
from svd_ds.data.shared_memory import check_shared_memory

XT = DataConfig(num_frames=25, height=576, width=1024, num_workers=4, prefetch=2)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Free bytes of the shared memory."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    return usage


def test_memory_for_the_batches_of_all_ranks_is_required(tmp_path: Path, free: SimpleNamespace) -> None:
    free.free = 8 * (4 * 2 + 1) * 25 * 3 * 576 * 1024
    check_shared_memory(XT, [1], num_ranks=8, folder=tmp_path)
    free.free -= 1
    with pytest.raises(
        ValueError, match=r"3.19 GB free, and data.num_workers 4 with data.prefetch 2 keep 3.19"
    ):
        check_shared_memory(XT, [1], num_ranks=8, folder=tmp_path)


def test_container_with_64_mb_is_refused_with_both_numbers(tmp_path: Path, free: SimpleNamespace) -> None:
    free.free = 64 << 20
    sentence = r"has 0.0671 GB free.* keep 3.19 GB of batches in it for the 8 ranks .*docker run --shm-size"
    with pytest.raises(ValueError, match=sentence):
        check_shared_memory(XT, [1], num_ranks=8, folder=tmp_path)


def test_cached_latents_need_less(tmp_path: Path, free: SimpleNamespace) -> None:
    latents = DataConfig(
        num_frames=25, height=576, width=1024, num_workers=4, prefetch=2, latents=True, crop="center"
    )
    free.free = 600_000_000
    check_shared_memory(latents, [1], num_ranks=8, folder=tmp_path)


def test_largest_bucket_counts(tmp_path: Path, free: SimpleNamespace) -> None:
    buckets = DataConfig(num_frames=8, height=64, width=64, buckets={"8x64x64": 1, "1x64x64": 16})
    free.free = (2 * 2 + 1) * 16 * 3 * 64 * 64
    check_shared_memory(buckets, [1, 16], num_ranks=1, folder=tmp_path)
    with pytest.raises(ValueError, match="docker"):
        check_shared_memory(buckets, [1, 17], num_ranks=1, folder=tmp_path)


def test_run_without_workers_or_without_the_file_system_needs_none(
    tmp_path: Path, free: SimpleNamespace
) -> None:
    check_shared_memory(DataConfig(num_workers=0), [1], num_ranks=8, folder=tmp_path)
    check_shared_memory(XT, [1], num_ranks=8, folder=tmp_path / "absent")
