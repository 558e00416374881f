"""Stages over files: results are reused, and files that fail or crash their process do not stop the
others."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from svd_ds.curate.pipeline import list_refused, progress_bar
from svd_ds.curate.raw import RawFile, find_raw_files
from svd_ds.curate.stages import Runner, Stage, StageContext, valid_rows
from svd_ds.curate.table import Row, RowsByStage, Table

COLUMNS = {"size": pa.int64()}


@dataclass(frozen=True)
class SizeSettings:
    factor: int = 1
    device: str = "cpu"


def measure(
    settings: SizeSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield the file's size; some contents simulate failures."""
    content = file.path.read_text()
    yield {"size": len(content) * settings.factor}
    if content == "exit":
        os._exit(9)
    if content == "hang":
        # Like a hanging decoder: it never returns to the interpreter, and holds its lock.
        ctypes.PyDLL(None).sleep(600)
    if content == "refuse":
        raise ValueError("it is\nno good")
    if content == "mistake":
        raise KeyError("ours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"a": "one", "b": "refuse", "c": "three"}.items():
        (tmp_path / "raw" / f"{name}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{name}.mp4").write_text(content)
    return tmp_path


def run(folder: Path, stage: Stage, num_workers: int = 0, timeout: float = 60.0) -> Runner:
    out = folder / "out"
    with (
        progress_bar() as progress,
        Runner(find_raw_files(folder / "raw", out), out, num_workers, progress, timeout) as runner,
    ):
        for earlier in (*stage.depends_on, stage):
            runner.run(earlier)
    return runner


def fragments(folder: Path) -> list[Path]:
    return sorted((folder / "out").rglob("*.parquet"))


def test_rows_before_a_refusal_reach_the_next_stage(folder: Path) -> None:
    first = Stage("first", measure, COLUMNS, SizeSettings())
    runner = run(folder, Stage("second", count, COLUMNS, None, (first,)))
    assert {
        name: [row["size"] for row in valid_rows(rows)] for name, rows in runner.results["first"].items()
    } == {
        "a.mp4": [3],
        "b.mp4": [6],
        "c.mp4": [5],
    }
    assert list_refused(runner) == [("b.mp4", "it is no good")]
    assert {name: rows[0]["size"] for name, rows in runner.results["second"].items()} == {
        "a.mp4": 1,
        "b.mp4": 1,
        "c.mp4": 1,
    }


def count(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
    yield {"size": len(inputs["first"])}


def test_stage_repeats_work_only_if_settings_or_version_change(folder: Path) -> None:
    run(folder, Stage("first", measure, COLUMNS, SizeSettings()))
    done = fragments(folder)
    run(folder, Stage("first", measure, COLUMNS, SizeSettings(device="cuda")))
    assert fragments(folder) == done, "the device does not change the results"
    other = run(folder, Stage("first", measure, COLUMNS, SizeSettings(2)))
    assert other.results["first"]["a.mp4"][0]["size"] == 6 and len(fragments(folder)) == 2
    run(folder, Stage("first", measure, COLUMNS, SizeSettings(2), version=2))
    assert len(fragments(folder)) == 3
    back = run(folder, Stage("first", measure, COLUMNS, SizeSettings()))
    assert back.results["first"]["a.mp4"][0]["size"] == 3 and len(fragments(folder)) == 3


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        SyntaxError("broken PNG"),
        RecursionError("too deep"),
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
        AttributeError("no caption \ud83d"),
        OSError("no such codec"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exception_refuses_only_its_own_file(folder: Path, error: Exception) -> None:
    def work(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
        yield {"size": 1}
        if file.name == "b.mp4":
            raise error

    stage = Stage("first", work, COLUMNS)
    runner = run(folder, stage)
    ((name, reason),) = list_refused(runner)
    assert name == "b.mp4" and type(error).__name__ in reason and reason.isprintable()
    # The refusal is recorded: the next run does not read the file again.
    assert set(Table(stage.folder(folder / "out"), COLUMNS).read()) == {"a.mp4", "b.mp4", "c.mp4"}


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (MemoryError(), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError),
    ],
    ids=str,
)
def test_error_of_the_machine_refuses_no_file(
    folder: Path, error: Exception, ending: type[Exception]
) -> None:
    def work(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
        yield {"size": 1}
        if file.name == "b.mp4":
            raise error

    stage = Stage("first", work, COLUMNS)
    with pytest.raises(ending) as ended:
        run(folder, stage)
    assert ending is OSError or "memory ran out while b.mp4 was read" in str(ended.value)
    assert "b.mp4" not in Table(stage.folder(folder / "out"), COLUMNS).read()


def test_model_that_cannot_be_loaded_refuses_no_file(folder: Path) -> None:
    def load(settings: SizeSettings) -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run(folder, Stage("first", measure, COLUMNS, SizeSettings(), load_model=load))
    assert fragments(folder) == []


def test_duplicate_results_of_two_machines_count_once(tmp_path: Path) -> None:
    table = Table(tmp_path, COLUMNS)
    for _ in range(2):
        table.add([{"video": "a", "stamp": 1, "size": 3}, {"video": "a", "stamp": 1, "size": 4}])
    table.add([{"video": "b", "stamp": 1, "size": 5}])
    assert {name: [row["size"] for row in rows] for name, rows in table.read().items()} == {
        "a": [3, 4],
        "b": [5],
    }
    table.add([])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_file_that_crashes_its_process_is_refused_and_the_others_are_processed(folder: Path) -> None:
    (folder / "raw" / "bad.mp4").write_text("exit")
    runner = run(folder, Stage("first", measure, COLUMNS, SizeSettings()), num_workers=2)
    assert list_refused(runner) == [("b.mp4", "it is no good"), ("bad.mp4", "reading it crashes the process")]
    assert {name for name, rows in runner.results["first"].items() if valid_rows(rows)} == {
        "a.mp4",
        "b.mp4",
        "c.mp4",
    }


@pytest.mark.slow
def test_file_that_hangs_is_refused_and_retried_with_a_longer_timeout(folder: Path) -> None:
    hanging = folder / "raw" / "bad.mp4"
    hanging.write_text("hang")
    stage = Stage("first", measure, COLUMNS, SizeSettings())
    runner = run(folder, stage, num_workers=2, timeout=1.0)
    assert list_refused(runner) == [("b.mp4", "it is no good"), ("bad.mp4", "reading it takes more than 1 s")]
    assert {name for name, rows in runner.results["first"].items() if valid_rows(rows)} == {
        "a.mp4",
        "b.mp4",
        "c.mp4",
    }
    done = fragments(folder)
    assert list_refused(run(folder, stage, num_workers=2, timeout=0.5)) == list_refused(runner)
    assert fragments(folder) == done, "it is not tried again in less time"
    expected = [("b.mp4", "it is no good"), ("bad.mp4", "reading it takes more than 1.5 s")]
    assert list_refused(run(folder, stage, num_workers=2, timeout=1.5)) == expected
