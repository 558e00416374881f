"""run.resume, for a new run and for each restart of it with the same arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.resume import Resume, find_checkpoint
from svd_ds.weights.manifest import COMPLETE
from tests.unit.training.test_checkpoint import checkpoints, save


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def restart(folder: Path, resume: str) -> tuple[Resume, Checkpoints]:
    """Restart the run with this run.resume, up to the point from which it may save."""
    store = checkpoints(folder, start_session=None, keep_last=9)
    found = find_checkpoint(store, resume)
    step = int(found.path.name.removeprefix("step-")) if found.path is not None else 0
    store.start_session(step, found.origin)
    return found, store


def test_named_checkpoint_of_own_run_rewinds_the_run_only_once(folder: Path) -> None:
    store = checkpoints(folder, keep_last=9)
    for step in (2, 4, 6):
        save(store, step)
    named = folder / "step-0000002"
    for _ in range(2):  # nothing is saved by the first of them
        found, store = restart(folder, str(named))
        assert found == Resume(named, "step-0000002")
    save(store, 4)
    save(store, 8)
    for step in (8, 10):
        found, store = restart(folder, str(named))
        assert (found.path, found.origin) == (folder / f"step-{step:07d}", "step-0000002")
        assert "run.resume" in found.note and str(named) in found.note
        save(store, step + 2)


def test_named_checkpoint_may_be_removed_once_the_run_has_its_own(folder: Path) -> None:
    """checkpoint.keep_last removes it."""
    store = checkpoints(folder, keep_last=1)
    save(store, 2)
    store.start_session(2, "step-0000002")
    save(store, 4)
    assert not (folder / "step-0000002").exists()
    assert restart(folder, str(folder / "step-0000002"))[0].path == folder / "step-0000004"


def test_named_checkpoint_of_another_run_is_resumed_until_the_run_has_its_own(tmp_path: Path) -> None:
    other, own = tmp_path / "other/checkpoints", tmp_path / "own/checkpoints"
    save(checkpoints(other), 4)
    save(checkpoints(own), 2)  # of an earlier restart, which does not descend from the named one
    named = other / "step-0000004"
    found, store = restart(own, str(named))
    assert found.path == named
    save(store, 6)
    assert restart(own, str(named))[0].path == own / "step-0000006"
    assert restart(own, f"{other}/../checkpoints/step-0000004/")[0].path == own / "step-0000006", (
        "by any spelling"
    )


def test_restart_by_auto_keeps_the_origin(tmp_path: Path) -> None:
    other, own = tmp_path / "other/checkpoints", tmp_path / "own/checkpoints"
    save(checkpoints(other), 4)
    _, store = restart(own, str(other / "step-0000004"))
    save(store, 6)
    _, store = restart(own, "auto")
    save(store, 8)
    assert restart(own, str(other / "step-0000004"))[0].path == own / "step-0000008"


def test_another_named_checkpoint_is_resumed(tmp_path: Path) -> None:
    other, own = tmp_path / "other/checkpoints", tmp_path / "own/checkpoints"
    store = checkpoints(other, keep_last=9)
    for step in (2, 4):
        save(store, step)
    _, store = restart(own, str(other / "step-0000004"))
    save(store, 6)
    found, store = restart(own, str(other / "step-0000002"))
    assert found.path == other / "step-0000002"
    save(store, 4)
    assert restart(own, str(other / "step-0000004"))[0].path == other / "step-0000004"


@pytest.mark.parametrize(
    ("saved", "now", "resumes"),
    [
        (("7", "0"), ("7", "1"), True),
        (("7", "1"), ("7", "3"), True),
        (("7", "0"), ("7", "0"), False),  # started twice by hand in one allocation
        (("7", "0"), ("8", "0"), False),
        (("7", "0"), ("8", "2"), False),  # its own earlier restarts saved no checkpoint
        (None, None, False),
    ],
)
def test_resume_never_refuses_a_folder_with_checkpoints_of_another_job(
    saved: tuple[str, str] | None,
    now: tuple[str, str] | None,
    resumes: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def set_restart(numbers: tuple[str, str] | None) -> None:
        for name, number in zip(("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), numbers or (), strict=False):
            monkeypatch.setenv(name, number)

    set_restart(saved)
    found, store = restart(folder, "never")
    assert found == Resume(None)
    save(store, 2)
    set_restart(now)
    if resumes:
        assert restart(folder, "never")[0].path == folder / "step-0000002"
    else:
        with pytest.raises(ValueError, match=r"run\.resume is never, .* has .*step-0000002"):
            restart(folder, "never")


def test_folder_that_is_no_checkpoint_is_refused_by_run_resume(folder: Path) -> None:
    save(checkpoints(folder), 2)
    with pytest.raises(ValueError, match=r"run\.resume is 'nowhere'"):
        restart(folder, "nowhere")
    (folder / "step-0000002" / COMPLETE).unlink()
    with pytest.raises(ValueError, match=rf"run\.resume is '.*step-0000002': .*{COMPLETE}"):
        restart(folder, str(folder / "step-0000002"))
