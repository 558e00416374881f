"""Each file of a run damaged in turn: the run resumes from what is intact, or one sentence names the damage.

One rank in the process of the test: starting a hundred processes would take longer than all other tests.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from svd_ds.cli import USER_ERRORS
from svd_ds.training.preview import Previews
from tests.one_rank import start
from tests.runs import metrics

STEPS = 4
"""Steps of the run that is never stopped; the others are damaged after the step before."""
SETTINGS = ("checkpoint.every=1", "checkpoint.keep_last=2")
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: flipped(content, len(content) // 2),
    "deleted": lambda content: None,
}
NEWEST = f"checkpoints/step-{STEPS - 1:07d}"
WRITTEN_BY_THE_RUN = (
    "COMPLETE", "state.json", "adam.json", "unet/config.json", "unet/rank-00000-of-00001.safetensors",
    "adam-exp_avg/rank-00000-of-00001.safetensors", "adam-exp_avg_sq/rank-00000-of-00001.safetensors",
    "ema-power-0.100/rank-00000-of-00001.safetensors",
)  # fmt: skip
OUTSIDE = (
    "config.yaml", "metrics.jsonl", "logs/restarts.jsonl", "logs/outcome.json", "logs/train.log",
    "logs/rank-00000.log",
)  # fmt: skip


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@dataclass(frozen=True)
class Runs:
    base: Path
    """Folder of a run stopped after step 3, with checkpoints of steps 2 and 3."""
    losses: dict[int, float]
    """Losses of the run that was never stopped, by step."""


@pytest.fixture(scope="module", autouse=True)
def _no_previews_or_report() -> Iterator[None]:
    """Skip previews and report, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Previews, "make", lambda *_: None)
        patch.setattr("svd_ds.run.write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _fast_garbage_collection() -> Iterator[None]:
    """Exclude imported modules from garbage collection, which took a fifth of the time."""
    import svd_ds.run  # noqa: F401 (it is among them)

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("torn")
    start(shards, folder / "uninterrupted", f"run.steps={STEPS}", *SETTINGS)
    start(shards, folder / "base", f"run.steps={STEPS - 1}", *SETTINGS)
    losses = {row["step"]: row["loss"] for row in metrics(folder / "uninterrupted")}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return Runs(folder / "base", losses)


def damage(path: Path, kind: str) -> None:
    content = DAMAGES[kind](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def resume(
    runs: Runs, shards: Path, folder: Path, kind: str, names: list[str], capfd: pytest.CaptureFixture[str]
) -> str:
    """Damage files of a copy of the run, resume it, and return what it printed or its one error.

    Whatever happens, no step has another loss than in the run that was never stopped.
    """
    run = folder / "run"
    shutil.copytree(runs.base, run)
    for name in names:
        damage(run / name, kind)
    capfd.readouterr()
    try:
        start(shards, run, f"run.steps={STEPS}", *SETTINGS)
    except USER_ERRORS as error:
        printed = str(error)
        assert "\n" not in printed and printed.count("Traceback") == 0
    else:
        printed = capfd.readouterr().out
        assert metrics(run)[-1]["step"] == STEPS
    for row in metrics(run):
        # Within one process, sums may differ in their last bits from one run to the next.
        expected = pytest.approx(runs.losses[row["step"]], rel=0, abs=1e-5)
        assert row["loss"] == expected, (kind, names, row, printed)
    shutil.rmtree(run)
    return printed


CASES = [(kind, name) for name in WRITTEN_BY_THE_RUN for kind in DAMAGES]
FAST = [("flipped", "unet/rank-00000-of-00001.safetensors"), ("emptied", "COMPLETE")]


def check_newest(
    runs: Runs, shards: Path, folder: Path, kind: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = resume(runs, shards, folder, kind, [f"{NEWEST}/{name}"], capfd)
    assert "resuming at step 2" in printed
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert "step-0000002" in warning and "step-0000003" in warning and name in warning, warning


@pytest.mark.parametrize(("kind", "name"), FAST)
def test_damaged_newest_checkpoint_is_named_and_the_run_resumes_from_the_older_one(
    runs: Runs, shards: Path, tmp_path: Path, kind: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check_newest(runs, shards, tmp_path, kind, name, capfd)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_damaged_file_of_the_newest_checkpoint_is_named(
    runs: Runs, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind, name in CASES:
        if (kind, name) not in FAST:
            check_newest(runs, shards, tmp_path, kind, name, capfd)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_damaged_file_outside_the_checkpoints_costs_no_step(
    runs: Runs, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in OUTSIDE:
        for kind in DAMAGES:
            printed = resume(runs, shards, tmp_path, kind, [name], capfd)
            if "resuming at step" not in printed:
                # A byte of config.yaml may make another config of it, which is refused by its key.
                named = Path(name).name in printed or (
                    name == "config.yaml" and "belongs to another config" in printed
                )
                assert named, (kind, name, printed)


@pytest.mark.slow
def test_all_damaged_checkpoints_are_named_and_kept(
    runs: Runs, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in ("flipped", "deleted"):
        names = [f"checkpoints/step-{step:07d}/adam.json" for step in (2, 3)]
        printed = resume(runs, shards, tmp_path, kind, names, capfd)
        assert (
            "no checkpoint in" in printed
            and "step-0000003 (adam.json" in printed
            and "step-0000002 (" in printed
        )


@pytest.mark.slow
def test_checkpoints_without_manifests_are_not_a_new_run(
    runs: Runs, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both manifests are gone: the run must not begin again at step 0."""
    printed = resume(
        runs, shards, tmp_path, "deleted", [f"checkpoints/step-{step:07d}/COMPLETE" for step in (2, 3)], capfd
    )
    assert "no checkpoint in" in printed and "has no file COMPLETE" in printed


@pytest.mark.slow
def test_named_damaged_checkpoint_is_refused(
    runs: Runs, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs.base, tmp_path / "run")
    path = tmp_path / "run" / NEWEST
    damage(path / "state.json", "flipped")
    with pytest.raises(ValueError, match=r"step-0000003 is damaged: state.json has another checksum"):
        start(shards, tmp_path / "run", f"run.steps={STEPS}", *SETTINGS, f"run.resume={path}")
    assert path.exists(), "a checkpoint that the user named is not moved"
