"""Triton's cache is a folder of this user on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from svd_ds.parallel.triton_cache import VARIABLE, use_local_cache


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def cache(**environ: str) -> Path:
    use_local_cache(environ)
    return Path(environ[VARIABLE])


def test_cache_is_local_and_belongs_to_user_and_job(temporary: Path) -> None:
    folder = cache(SLURM_JOB_ID="17")
    assert folder == cache(SLURM_JOB_ID="17") == temporary / f"svd_ds-triton-{os.getuid()}-17"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache() == temporary / f"svd_ds-triton-{os.getuid()}"


def test_folder_of_the_user_is_kept() -> None:
    assert cache(TRITON_CACHE_DIR="/scratch/kernels") == Path("/scratch/kernels")


@pytest.mark.parametrize("kind", ["writable for others", "a link"])
def test_folder_that_others_can_write_is_not_used(kind: str, temporary: Path) -> None:
    """Triton executes the contents of its cache."""
    name = temporary / f"svd_ds-triton-{os.getuid()}"
    if kind == "a link":
        (temporary / "elsewhere").mkdir()
        name.symlink_to(temporary / "elsewhere")
    else:
        name.mkdir()
        name.chmod(0o777)
    folder = cache()
    assert folder.parent == temporary and folder.resolve() != name.resolve()
    assert folder.stat().st_mode & 0o777 == 0o700
