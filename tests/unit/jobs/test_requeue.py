"""Queued restarts of a job: recorded before its ranks start, and refused once they make no progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.run_folder import RunFolder
from svd_ds.training.retention import acquire
from svd_ds.weights.restarts import Restart, read_restarts
from tests.networks import seal


def rows(folder: RunFolder) -> list[Restart]:
    return read_restarts(folder.checkpoints)


def test_job_without_progress_is_not_restarted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(3):
        record_queued_restart(folder, 7, limit=3)
    with pytest.raises(ValueError, match=r"job 7 .* 3 times from step 0"):
        record_queued_restart(folder, 7, limit=3)
    record_queued_restart(folder, 8, limit=3)  # the run is submitted again
    for name, marker in (("step-0000020", True), ("step-0000040", False)):
        (folder.checkpoints / name).mkdir(parents=True)
        if marker:
            seal(folder.checkpoints / name)
    record_queued_restart(folder, 7, limit=3)
    assert [row.step for row in rows(folder)] == [0, 0, 0, 0, 20], (
        "a checkpoint without its marker does not count"
    )


def test_only_queued_restarts_count_for_the_limit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(2):
        record_queued_restart(folder, 7, limit=3)
        acquire(folder.checkpoints, 0, restart_id=(7, 0))
    record_queued_restart(folder, 7, limit=3)
    with pytest.raises(ValueError, match=r"job 7 .* 3 times from step 0"):
        record_queued_restart(folder, 7, limit=3)
    assert [row.is_queued for row in rows(folder)] == [True, False, True, False, True]


def test_row_has_the_restart_count_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record_queued_restart(RunFolder(tmp_path), 7, limit=3)
    (row,) = rows(RunFolder(tmp_path))
    assert (row.job, row.restart, row.token) == (7, 2, "")


@pytest.mark.parametrize("tail", ['{"job": 7, "st', "\xff\n{}\n"])
def test_damaged_tail_is_set_aside_and_reported_once(tmp_path: Path, tail: str) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/restarts.jsonl"
    assert record_queued_restart(folder, 7, limit=3) is None
    path.write_bytes(path.read_bytes() + tail.encode("latin-1"))
    damage = record_queued_restart(folder, 7, limit=3)
    assert damage is not None and damage.endswith("restarts.jsonl.damaged-1")
    assert [row.job for row in rows(folder)] == [7, 7]
    assert record_queued_restart(folder, 7, limit=3) is None


def test_last_row_without_its_newline_is_kept(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/restarts.jsonl"
    record_queued_restart(folder, 7, limit=3)
    path.write_text(path.read_text().rstrip("\n"))
    assert record_queued_restart(folder, 7, limit=3) is None
    assert [row.job for row in rows(folder)] == [7, 7]


def test_row_that_lost_its_token_does_not_pass_for_a_queued_one(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/restarts.jsonl"
    acquire(folder.checkpoints, 0)
    path.write_text(path.read_text().replace('"token"', '"tokem"'))
    assert rows(folder) == []


def test_damage_before_readable_rows_is_refused(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/restarts.jsonl"
    record_queued_restart(folder, 7, limit=3)
    path.write_bytes(b"\xff\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"restarts\.jsonl is damaged: line 1 cannot be read"):
        record_queued_restart(folder, 7, limit=3)
