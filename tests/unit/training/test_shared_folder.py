"""Check of the run folder on one rank; tests/distributed/test_run_folder.py has it on two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from svd_ds.parallel.collectives import RetryableSharedError, SharedError
from svd_ds.parallel.env import Env
from svd_ds.training.shared_folder import ABANDONED_S, TOKEN, check_shared_folder


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_missing_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    check_shared_folder(tmp_path / "runs/new", Env.read({}))
    assert list((tmp_path / "runs/new").iterdir()) == []


def test_relative_folder_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_shared_folder(Path("runs/new"), Env.read({}))
    assert (tmp_path / "runs/new").is_dir()


def test_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for run in (tmp_path / "taken", tmp_path / "taken/run"):
        with pytest.raises(SharedError, match=rf"^run\.dir={run} cannot be made or written to: ") as raised:
            check_shared_folder(run, Env.read({}))
        assert not isinstance(raised.value, RetryableSharedError), "the same name would be refused again"


def test_full_disk_is_named_and_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        RetryableSharedError, match=rf"run\.dir={tmp_path} cannot .*No space left on device: "
    ):
        check_shared_folder(tmp_path, Env.read({}))


def test_token_of_a_killed_process_is_removed_and_that_of_another_restart_is_not(tmp_path: Path) -> None:
    killed, other = tmp_path / f"{TOKEN}.0", tmp_path / f"{TOKEN}.1"
    for token in (killed, other):
        token.write_text("")
    long_ago = other.stat().st_mtime - ABANDONED_S - 60
    os.utime(killed, (long_ago, long_ago))
    check_shared_folder(tmp_path, Env.read({}))
    assert list(tmp_path.iterdir()) == [other]
