"""Stages over files: done once, kept through mistakes, and not ended by a file that ends its process."""

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

from svd_ds.curate.pipeline import progress_bar, refused
from svd_ds.curate.raw import RawFile, find_raw
from svd_ds.curate.stages import Place, Runner, Stage, sound
from svd_ds.curate.table import Known, Row, Table

COLUMNS = {"size": pa.int64()}


@dataclass(frozen=True)
class Factor:
    factor: int = 1
    device: str = "cpu"


def measure(settings: Factor, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """The file's size; a file may say what it does to who reads it."""
    content = file.path.read_text()
    yield {"size": len(content) * settings.factor}
    if content == "exit":
        os._exit(9)
    if content == "hang":
        # As a decoder may: it never comes back to the interpreter, whose lock it holds.
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
        Runner(find_raw(folder / "raw", out), out, num_workers, progress, timeout) as runner,
    ):
        for earlier in (*stage.after, stage):
            runner.run(earlier)
    return runner


def fragments(folder: Path) -> list[Path]:
    return sorted((folder / "out").rglob("*.parquet"))


def test_rows_before_a_refusal_count_and_files_without_rows_go_no_further(folder: Path) -> None:
    first = Stage("first", measure, COLUMNS, Factor())
    runner = run(folder, Stage("second", count, COLUMNS, None, (first,)))
    assert {name: [row["size"] for row in sound(rows)] for name, rows in runner.found["first"].items()} == {
        "a.mp4": [3],
        "b.mp4": [6],
        "c.mp4": [5],
    }
    assert refused(runner) == [("b.mp4", "it is no good")]
    assert {name: rows[0]["size"] for name, rows in runner.found["second"].items()} == {
        "a.mp4": 1,
        "b.mp4": 1,
        "c.mp4": 1,
    }


def count(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    yield {"size": len(known["first"])}


def test_a_stage_does_what_is_not_done_under_its_settings(folder: Path) -> None:
    run(folder, Stage("first", measure, COLUMNS, Factor()))
    done = fragments(folder)
    run(folder, Stage("first", measure, COLUMNS, Factor(device="cuda")))
    assert fragments(folder) == done, "where a model runs decides nothing"
    other = run(folder, Stage("first", measure, COLUMNS, Factor(2)))
    assert other.found["first"]["a.mp4"][0]["size"] == 6 and len(fragments(folder)) == 2
    run(folder, Stage("first", measure, COLUMNS, Factor(2), version=2))
    assert len(fragments(folder)) == 3
    back = run(folder, Stage("first", measure, COLUMNS, Factor()))
    assert back.found["first"]["a.mp4"][0]["size"] == 3 and len(fragments(folder)) == 3


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
def test_any_exception_of_a_file_is_its_refusal_and_costs_no_other(folder: Path, error: Exception) -> None:
    def work(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
        yield {"size": 1}
        if file.name == "b.mp4":
            raise error

    stage = Stage("first", work, COLUMNS)
    runner = run(folder, stage)
    ((name, reason),) = refused(runner)
    assert name == "b.mp4" and type(error).__name__ in reason and reason.isprintable()
    # It is recorded: the next start does not read the file again.
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
def test_a_fault_of_the_machine_refuses_no_file(
    folder: Path, error: Exception, ending: type[Exception]
) -> None:
    def work(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
        yield {"size": 1}
        if file.name == "b.mp4":
            raise error

    stage = Stage("first", work, COLUMNS)
    with pytest.raises(ending) as ended:
        run(folder, stage)
    assert ending is OSError or "memory ran out while b.mp4 was read" in str(ended.value)
    assert "b.mp4" not in Table(stage.folder(folder / "out"), COLUMNS).read()


def test_a_model_that_cannot_be_loaded_refuses_no_file(folder: Path) -> None:
    def load(settings: Factor) -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run(folder, Stage("first", measure, COLUMNS, Factor(), prepare=load))
    assert fragments(folder) == []


def test_what_two_machines_did_twice_counts_once(tmp_path: Path) -> None:
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
def test_a_file_that_ends_its_process_is_refused_and_the_others_go_on(folder: Path) -> None:
    (folder / "raw" / "bad.mp4").write_text("exit")
    runner = run(folder, Stage("first", measure, COLUMNS, Factor()), num_workers=2)
    assert refused(runner) == [("b.mp4", "it is no good"), ("bad.mp4", "reading it ends the process")]
    assert {name for name, rows in runner.found["first"].items() if sound(rows)} == {
        "a.mp4",
        "b.mp4",
        "c.mp4",
    }


@pytest.mark.slow
def test_a_file_that_hangs_is_refused_and_tried_again_where_there_is_longer(folder: Path) -> None:
    hanging = folder / "raw" / "bad.mp4"
    hanging.write_text("hang")
    stage = Stage("first", measure, COLUMNS, Factor())
    runner = run(folder, stage, num_workers=2, timeout=1.0)
    assert refused(runner) == [("b.mp4", "it is no good"), ("bad.mp4", "reading it takes more than 1 s")]
    assert {name for name, rows in runner.found["first"].items() if sound(rows)} == {
        "a.mp4",
        "b.mp4",
        "c.mp4",
    }
    done = fragments(folder)
    assert refused(run(folder, stage, num_workers=2, timeout=0.5)) == refused(runner)
    assert fragments(folder) == done, "it is not tried again in less time"
    told = [("b.mp4", "it is no good"), ("bad.mp4", "reading it takes more than 1.5 s")]
    assert refused(run(folder, stage, num_workers=2, timeout=1.5)) == told
