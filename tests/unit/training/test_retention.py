"""The folder of a run's checkpoints: who owns it, and what a commit refuses, replaces and removes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from svd_ds.jobs import requeue
from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.run_folder import RunFolder
from svd_ds.training import retention
from svd_ds.training.retention import CheckpointConfig, acquire, check_not_fenced, commit, draft_name
from svd_ds.weights.manifest import FileDigest, Manifest
from svd_ds.weights.restarts import (
    complete_checkpoints,
    read_acquired_restarts,
    read_restarts,
    restarts_path,
)
from tests.unit.training.test_checkpoint import checkpoints, save

FILE = "unet/rank-0000{}-of-00002.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("missing", [0, 1])
def test_draft_without_the_file_of_a_rank_is_not_committed(folder: Path, missing: int) -> None:
    """Rank 0 sees such a draft if the folder of another rank is on another disk."""
    token = acquire(folder, 0)
    draft = folder / draft_name("step-0000002", token)
    (draft / "unet").mkdir(parents=True)
    (draft / FILE.format(1 - missing)).write_bytes(b"abc")
    manifest = Manifest(token, 2, True, {FILE.format(rank): FileDigest(3, "0") for rank in range(2)})
    with pytest.raises(ValueError, match=f"rank-0000{missing}-of-00002.* is missing; all 2 ranks must see"):
        commit(draft, manifest, CheckpointConfig(), newest_proven=-1)
    assert complete_checkpoints(folder) == {}


def test_run_survives_a_lost_restarts_file(folder: Path) -> None:
    store, restarts = checkpoints(folder, keep_last=9), restarts_path(folder)
    save(store, 1)
    restarts.unlink()
    save(store, 2)
    restarts.write_text("")
    save(store, 3)
    restarts.write_bytes(bytes(20))
    save(store, 4)
    assert not store.is_fenced()
    assert list(complete_checkpoints(folder)) == [1, 2, 3, 4]
    after = checkpoints(folder, start_session=4, keep_last=9)
    assert [restart.token for restart in read_restarts(folder)] == [after.token]
    assert store.is_fenced() and not after.is_fenced()


def test_torn_last_row_belongs_to_the_newest_restart(folder: Path) -> None:
    stale = checkpoints(folder)
    store, restarts = checkpoints(folder), restarts_path(folder)
    restarts.write_bytes(restarts.read_bytes()[:-9])
    check_not_fenced(folder, store.token)
    save(store, 1)
    assert stale.is_fenced(), "only one of the two may write"


def test_stale_process_stays_fenced_after_damage_of_the_restarts_file(folder: Path) -> None:
    stale, store = checkpoints(folder), checkpoints(folder)
    restarts = restarts_path(folder)
    tokens = [restart.token for restart in read_restarts(folder)]
    assert tokens == [stale.token, store.token]
    restarts.write_bytes(restarts.read_bytes() + bytes(20))
    assert stale.is_fenced()


def test_queued_restart_does_not_fence_the_running_process(folder: Path) -> None:
    store, run = checkpoints(folder), RunFolder(folder.parent)
    record_queued_restart(run, 7, limit=3)
    assert not store.is_fenced()
    save(store, 2)
    assert store.latest() == folder / "step-0000002", "the queued row begins at step 0"
    after = checkpoints(folder, start_session=2)
    assert store.is_fenced() and not after.is_fenced()
    assert [restart.is_queued for restart in read_restarts(folder)] == [False, True, False]


def test_restart_that_is_queued_during_an_acquire_removes_no_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it did, the token of the stale process would be the newest again, and it could write."""
    stale, append_row = checkpoints(folder), requeue.append_row
    acquired: list[str] = []

    def append_late(*arguments: Any) -> None:
        acquired.append(acquire(folder, 0))
        append_row(*arguments)

    monkeypatch.setattr(requeue, "append_row", append_late)
    record_queued_restart(RunFolder(folder.parent), 7, limit=3)
    assert [restart.token for restart in read_restarts(folder)] == [stale.token, *acquired, ""]
    check_not_fenced(folder, acquired[0])
    assert stale.is_fenced()


def test_acquire_during_a_queued_restart_loses_no_more_than_its_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, write_text = checkpoints(folder), retention.write_text

    def write_late(*arguments: Any) -> None:
        record_queued_restart(RunFolder(folder.parent), 7, limit=3)
        write_text(*arguments)

    monkeypatch.setattr(retention, "write_text", write_late)
    token = acquire(folder, 0)
    assert [restart.token for restart in read_acquired_restarts(folder)] == [stale.token, token]
    check_not_fenced(folder, token)
    assert stale.is_fenced()


def test_checkpoint_folder_that_was_moved_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = checkpoints(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"^{folder} is gone: it was moved or removed while"):
        store.check_not_fenced()
    assert not folder.exists()


def test_links_to_checkpoints_are_pruned_and_their_targets_are_kept(tmp_path: Path) -> None:
    """Example: links to checkpoints that a user moved to another disk."""
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    store = checkpoints(folder, keep_last=1)
    save(store, 1)
    shutil.move(folder / "step-0000001", other)
    (folder / "step-0000001").symlink_to(other)
    assert list(complete_checkpoints(folder)) == [1]
    save(store, 2)
    assert [path.name for path in folder.iterdir()] == ["step-0000002"]
    assert (other / "state.json").exists()


@pytest.mark.parametrize("kind", ["file", "dead link", "empty folder"])
def test_other_entry_at_the_name_of_a_checkpoint_is_replaced(folder: Path, kind: str) -> None:
    store, path = checkpoints(folder), folder / "step-0000001"
    if kind == "file":
        path.write_text("")
    elif kind == "dead link":
        path.symlink_to(folder / "nothing")
    else:
        path.mkdir()
    save(store, 1)
    assert list(complete_checkpoints(folder)) == [1]
    assert [path.name for path in folder.iterdir()] == ["step-0000001"]


def test_drafts_of_killed_restarts_are_removed_even_as_files_or_links(folder: Path) -> None:
    (folder / "step-0000001.ab.tmp").mkdir()
    (folder / "step-0000002.ab.tmp").write_text("")
    (folder / "step-0000003.ab.tmp").symlink_to(folder)
    acquire(folder, 0)
    assert list(folder.iterdir()) == []
