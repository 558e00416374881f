"""The folder of a run's checkpoints: what publishing refuses, replaces and removes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from svd_ds.training.retention import CheckpointConfig, acquire, check_not_fenced, commit, draft_name
from svd_ds.weights.manifest import FileDigest, Manifest
from svd_ds.weights.restarts import RESTARTS, complete_checkpoints, read_restarts
from tests.unit.training.test_checkpoint import checkpoints, save

FILE = "unet/rank-0000{}-of-00002.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("missing", [0, 1])
def test_draft_without_one_ranks_file_is_not_published(tmp_path: Path, missing: int) -> None:
    """As rank 0 sees it where another rank's folder is another disk."""
    token = acquire(tmp_path, 0)
    draft = tmp_path / draft_name("step-0000002", token)
    (draft / "unet").mkdir(parents=True)
    (draft / FILE.format(1 - missing)).write_bytes(b"abc")
    manifest = Manifest(token, 2, True, {FILE.format(rank): FileDigest(3, "0") for rank in range(2)})
    with pytest.raises(ValueError, match=f"rank-0000{missing}-of-00002.* is missing; all 2 ranks must see"):
        commit(draft, manifest, CheckpointConfig(), good=-1)
    assert complete_checkpoints(tmp_path) == {}


def test_lost_list_of_starts_ends_no_run(tmp_path: Path) -> None:
    store, lives = checkpoints(tmp_path, keep_last=9), tmp_path / RESTARTS
    save(store, 1)
    lives.unlink()
    save(store, 2)
    lives.write_text("")
    save(store, 3)
    lives.write_bytes(bytes(20))
    save(store, 4)
    assert not store.is_fenced()
    assert list(complete_checkpoints(tmp_path)) == [1, 2, 3, 4]
    after = checkpoints(tmp_path, start_session=4, keep_last=9)
    assert [life.token for life in read_restarts(tmp_path)] == [after.token]
    assert store.is_fenced() and not after.is_fenced()


def test_torn_last_line_is_that_of_the_start_that_goes_on(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    store, lives = checkpoints(tmp_path), tmp_path / RESTARTS
    lives.write_bytes(lives.read_bytes()[:-9])
    check_not_fenced(tmp_path, store.token)
    save(store, 1)


def test_checkpoint_folder_that_was_moved_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = checkpoints(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"^{folder} is gone: it was moved or removed while"):
        store.check_not_fenced()
    assert not folder.exists()


def test_links_to_checkpoints_are_pruned_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    """Such as those that a person has moved to another disk."""
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    store = checkpoints(folder, keep_last=1)
    save(store, 1)
    shutil.move(folder / "step-0000001", other)
    (folder / "step-0000001").symlink_to(other)
    assert list(complete_checkpoints(folder)) == [1]
    save(store, 2)
    assert {path.name for path in folder.iterdir()} == {RESTARTS, "step-0000002"}
    assert (other / "state.json").exists()


@pytest.mark.parametrize("kind", ["file", "dead link", "empty folder"])
def test_what_lies_at_a_checkpoints_name_is_replaced(tmp_path: Path, kind: str) -> None:
    store, path = checkpoints(tmp_path), tmp_path / "step-0000001"
    if kind == "file":
        path.write_text("")
    elif kind == "dead link":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.mkdir()
    save(store, 1)
    assert list(complete_checkpoints(tmp_path)) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {RESTARTS, "step-0000001"}


def test_drafts_of_killed_starts_are_removed_whatever_they_are(tmp_path: Path) -> None:
    (tmp_path / "step-0000001.ab.tmp").mkdir()
    (tmp_path / "step-0000002.ab.tmp").write_text("")
    (tmp_path / "step-0000003.ab.tmp").symlink_to(tmp_path)
    acquire(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [RESTARTS]
