"""Metrics files, console lines, and full disks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.fsync_io import LineFile
from svd_ds.run_folder import RunFolder
from svd_ds.training.evaluate import EvalResult
from svd_ds.training.metrics import LoggerConfig, Metrics
from svd_ds.training.null_metrics import StepMetrics


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        samples=8 * number,
        loss=0.5,
        lr=1e-3,
        grad_norm=1.0,
        clips_per_s=4.0,
        step_s=2.0,
        overheads_s={"data": 0.1, "checkpoint": 0.0, "evaluation": 0.0, "preview": 0.5},
    )


def folder(path: Path) -> RunFolder:
    run = RunFolder(path / "run")
    run.open({"model": {"widths": [32]}}, step=0)
    return run


def test_every_step_is_a_row_of_metrics_and_some_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(every=2, wandb="disabled"), {}, total_steps=5, step=0) as metrics:
        for number in range(1, 6):
            metrics.log(step(number))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["clips_per_s"] == 4.0
    assert rows[2]["data_s"] == 0.1 and rows[2]["preview_s"] == 0.5
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in printed] == ["1/5", "2/5", "4/5", "5/5"]
    assert "loss 0.5000  lr 1.00e-03  grad 1.000  4.00 clips/s  2.00 s/step  eta 0:02" in printed[2]
    assert (run.logs / "train.log").read_text().splitlines() == printed


def test_steps_lost_to_a_rollback_are_no_goodput(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(wandb="disabled"), {}, total_steps=5, step=0) as metrics:
        for number in (1, 2, 3):
            metrics.log(step(number))
        metrics.log_rollback(1, from_step=3)
        assert metrics.goodput.compute_s == pytest.approx(1.9)
        assert metrics.goodput.overheads_s["preview"] == pytest.approx(0.5)
        metrics.log(step(2))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def evaluation(loss: float) -> EvalResult:
    return EvalResult(
        "set", 4, [0.1, 1.0], [loss, loss], [loss + 1, loss + 1], [2.0, 3.0], [loss] * 4, [2.0] * 4
    )


def test_evaluations_and_skipped_steps_are_rows_and_a_resumed_run_drops_later_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(wandb="offline"), {}, total_steps=5, step=0) as metrics:
        for number in (1, 3):
            metrics.log_evaluation(number, 8 * number, evaluation(0.5))
            metrics.log_fault(number + 1, "the loss is nan", ["a", "b"])
    printed = capsys.readouterr().out
    assert "step 3  fixed set: loss 0.5000, with averaged weights 1.5000" in printed
    assert "step 4  skipped: the loss is nan" in printed
    run.open({}, step=3)
    rows = [json.loads(line) for line in run.evaluation.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]
    assert rows[1]["samples"] == 24 and rows[1]["grad_norm"] == [2.0, 3.0]
    assert [json.loads(line) for line in run.skipped.read_text().splitlines()] == [
        {
            "step": 2,
            "fault": "the loss is nan",
            "cause": "unknown",
            "message": "",
            "taken": False,
            "clips": ["a", "b"],
        }
    ]


def test_wandb_goes_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(), {"a": 1}, total_steps=1, step=0) as metrics:
        metrics.log(step(1))
    recorded = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 1
    run_id = (run.logs / "wandb-run-id").read_text()
    assert run_id in recorded[0].name
    with Metrics(run, LoggerConfig(), {"a": 1}, total_steps=1, step=0):
        pass
    assert (run.logs / "wandb-run-id").read_text() == run_id, "a resumed run keeps its id"


@pytest.mark.parametrize(("field", "value"), [("wandb", "loud"), ("every", 0)])
def test_config_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"logger.{field} is {value!r}"):
        LoggerConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl", "logs/skipped.jsonl"])
def test_full_disk_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(wandb="disabled"), {}, total_steps=5, step=0) as metrics:
        # Only written from here on: to read /dev/full has no end.
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to("/dev/full")
        metrics.jsonl = LineFile(run.metrics)
        log = {
            "metrics.jsonl": lambda: metrics.log(step(1)),
            "evaluation.jsonl": lambda: metrics.log_evaluation(1, 8, evaluation(0.5)),
            "logs/skipped.jsonl": lambda: metrics.log_fault(1, "the loss is nan", ["a"]),
        }[name]
        with pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"):
            log()


def test_full_disk_drops_a_line_of_train_log_and_the_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path)
    (run.logs / "train.log").symlink_to("/dev/full")
    with Metrics(run, LoggerConfig(wandb="disabled"), {}, total_steps=1, step=0) as metrics:
        metrics.log(step(1))
        metrics.print_line("done: 1 steps")
    assert capsys.readouterr().out.endswith("done: 1 steps\n")


def test_rollback_keeps_a_copy_of_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path)
    with Metrics(run, LoggerConfig(wandb="disabled"), {}, total_steps=5, step=0) as metrics:
        for number in (1, 2):
            metrics.log(step(number))
        with run.metrics.open("ab") as file:
            file.write(b"\0\0\n")
        metrics.log_rollback(1, from_step=2)
        metrics.log(step(2))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]
    assert "metrics.jsonl.damaged-1" in capsys.readouterr().out
