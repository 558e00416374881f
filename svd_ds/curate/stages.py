"""Stages of the curation, and the runner that applies a stage to every raw file once, in parallel processes.

Each stage has a table in a folder that is named after a fingerprint of its settings and of the stages that it
depends on. Other settings give another folder: earlier results are kept, and are used again when the settings
are restored. A stage processes the files that are not in its table in their current state.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import pyarrow as pa
import torch
from rich.progress import Progress

from svd_ds.curate.raw import RawFile
from svd_ds.curate.sidecars import FolderListings
from svd_ds.curate.table import Row, RowsByStage, Table
from svd_ds.data.quarantine import is_out_of_memory
from svd_ds.data.sidecar import clean_text
from svd_ds.data.workers import exit_with_parent

FLUSH_SECONDS = 10.0
"""Interval at which results are written: a killed run loses at most this much work."""
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Error codes that are caused by the machine and not by the file that was read."""
TIMEOUT = 3600.0
"""Default time limit of a stage for one file, in seconds: long enough to encode a feature film."""


@dataclass(frozen=True)
class StageContext:
    """Folders that a stage reads and writes."""

    out: Path
    """Output folder of the curation; media paths in tables are relative to it."""
    folder: Path
    """The stage's own folder, inside `out`."""


ProcessFn = Callable[[Any, RawFile, RowsByStage, StageContext], Iterator[Row]]
"""(settings, file, the file's rows from earlier stages, context) -> rows. A ValueError states why the file
yields no rows, or no more rows."""
FileTask = tuple[RawFile, RowsByStage]
"""A raw file and its rows from the stages that a stage depends on."""
RowsByFile = dict[str, list[Row]]
"""Rows of a stage, by the name of the raw file."""


@dataclass(frozen=True)
class Stage:
    """One step from raw files to clips."""

    name: str
    process: ProcessFn
    columns: Mapping[str, pa.DataType]
    settings: Any = None
    """A frozen dataclass of plain values, or None."""
    depends_on: tuple[Stage, ...] = ()
    load_model: Callable[[Any], object] | None = None
    """Function that loads the model named in the settings. A stage with a model runs in one process, and an
    error of this function is raised to the user instead of being recorded for each file."""
    version: int = 1
    """Increased when the same settings start to give different rows."""

    def fingerprint(self) -> str:
        """Return a hash of name, version, settings and of the stages that this one depends on."""
        settings = asdict(self.settings) if self.settings else {}
        settings.pop("device", None)  # the device does not change the results
        content = [self.name, self.version, settings, [stage.fingerprint() for stage in self.depends_on]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, out: Path) -> Path:
        return out / "stages" / f"{self.name}-{self.fingerprint()}"


@dataclass
class Runner:
    """Runs stages over one set of raw files."""

    files: Sequence[RawFile]
    out: Path
    num_workers: int
    """Number of worker processes; 0 works in this process, without a time limit for files."""
    progress: Progress
    timeout: float = TIMEOUT
    """Time limit of a stage for one file, in seconds. A file that exceeded a shorter limit in an earlier
    run is tried again."""
    results: dict[str, RowsByFile] = field(default_factory=dict)
    """Rows by stage name, of all stages that have run."""
    _pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, stage: Stage) -> None:
        """Process every file that is not done and for which the earlier stages have valid rows."""
        table = Table(stage.folder(self.out), stage.columns)
        is_file = FolderListings().is_file
        stamps = {file.name: file.stamp(is_file) for file in self.files}
        results = {
            name: rows
            for name, rows in table.read().items()
            if rows and rows[0]["stamp"] == stamps.get(name) and not self._should_retry(rows[-1])
        }
        tasks: list[FileTask] = []
        for file in self.files:
            earlier = {each.name: self.results[each.name] for each in stage.depends_on}
            inputs = {name: valid_rows(rows.get(file.name, ())) for name, rows in earlier.items()}
            if all(inputs.values()) and file.name not in results:
                tasks.append((file, inputs))
        if tasks and stage.load_model is not None:
            stage.load_model(stage.settings)
        bar = self.progress.add_task(stage.name, total=len(tasks))
        fresh: list[Row] = []
        flushed = time.monotonic()
        context = StageContext(self.out, stage.folder(self.out))
        process = partial(process_file, stage.process, stage.settings, context)
        try:
            for name, rows in self._process_all(process, tasks, in_process=stage.load_model is not None):
                results[name] = [{"video": name, "stamp": stamps[name], "error": None, **row} for row in rows]
                fresh += results[name]
                self.progress.advance(bar)
                if time.monotonic() > flushed + FLUSH_SECONDS:
                    table.add(fresh)
                    fresh, flushed = [], time.monotonic()
        finally:
            table.add(fresh)
        self.results[stage.name] = results

    def _should_retry(self, row: Row) -> bool:
        """Return True if the file exceeded a time limit that was shorter than the current one."""
        seconds = row.get("given_up_after")
        return seconds is not None and seconds < self.timeout

    def _process_all(
        self, process: Callable[[FileTask], list[Row]], tasks: Sequence[FileTask], in_process: bool
    ) -> Iterator[tuple[str, list[Row]]]:
        """Yield (file name, rows) as files are done, in any order."""
        if in_process or not self.num_workers:
            for task in tasks:
                yield task[0].name, process(task)
            return
        waiting = list(reversed(tasks))
        with TemporaryDirectory() as folder:
            limited = _TimeLimited(process, self.timeout, Path(folder))
            while waiting:
                suspects: list[FileTask] = []
                self._pool = self._pool or _make_pool(self.num_workers)
                yield from _drain(self._pool, limited, waiting, suspects, max_queued=2 * self.num_workers)
                if not suspects:
                    continue
                self.close()
                timed_out = [limited.has_timed_out(task) for task in suspects]
                for task, is_late in zip(suspects, timed_out, strict=True):
                    if is_late:
                        yield task[0].name, limited.timeout_rows
                    elif any(timed_out):
                        waiting.append(task)
                    else:
                        # One of the suspects crashed its process, as a decoder may on a hostile file.
                        yield task[0].name, _process_in_new_pool(limited, task)

    def close(self) -> None:
        """Stop the worker processes; tasks that have not started are dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _drain(
    pool: ProcessPoolExecutor,
    process: Callable[[FileTask], list[Row]],
    waiting: list[FileTask],
    suspects: list[FileTask],
    max_queued: int,
) -> Iterator[tuple[str, list[Row]]]:
    """Yield results as they arrive. When a worker process dies, move the tasks that ran to `suspects`."""
    running: dict[Future[list[Row]], FileTask] = {}
    while waiting or running:
        while waiting and len(running) < max_queued:
            task = waiting.pop()
            try:
                running[pool.submit(process, task)] = task
            except BrokenProcessPool:
                suspects.append(task)
                break
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                suspects.append(task)
            else:
                yield task[0].name, future.result()
        if suspects:
            suspects += running.values()
            return


@dataclass(frozen=True)
class _TimeLimited:
    """A process function that exits its process when a file takes too long."""

    process: Callable[[FileTask], list[Row]]
    seconds: float
    folder: Path
    """Folder with one log file for each task that is running."""

    def __call__(self, task: FileTask) -> list[Row]:
        with self._log(task).open("w") as log:
            # The only timer of Python that fires while a decoder holds the interpreter's lock.
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=log)
            try:
                return self.process(task)
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._log(task).unlink()

    def has_timed_out(self, task: FileTask) -> bool:
        """Return True if the timer ended the process: the task's log then contains a traceback."""
        return self._log(task).is_file() and self._log(task).stat().st_size > 0

    @property
    def timeout_rows(self) -> list[Row]:
        """Rows of a file that exceeded the time limit."""
        return [{"error": f"reading it takes more than {self.seconds:g} s", "given_up_after": self.seconds}]

    def _log(self, task: FileTask) -> Path:
        return self.folder / task[0].key


def _process_in_new_pool(limited: _TimeLimited, task: FileTask) -> list[Row]:
    """Process one file in a process of its own; a crash of the process becomes an error row."""
    with _make_pool(1) as pool:
        try:
            return pool.submit(limited, task).result()
        except BrokenProcessPool:
            timed_out = limited.has_timed_out(task)
            return limited.timeout_rows if timed_out else [{"error": "reading it crashes the process"}]


def _make_pool(num_workers: int) -> ProcessPoolExecutor:
    # Spawned: a fork of a process with threads of torch or OpenCV may hang.
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_init_worker)


def _init_worker() -> None:
    exit_with_parent()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def process_file(process: ProcessFn, settings: Any, context: StageContext, task: FileTask) -> list[Row]:
    """Return all rows of a file; if the file is refused, the last row contains the error.

    Any exception that a decoder, a detector or our own code raises on a file refuses this file only.

    Raises:
        OSError: an error of the machine, such as a full disk; the next run reads the file again.
        MemoryError: memory ran out while the file was read; the next run reads it again.
    """
    file, inputs = task
    rows: list[Row] = []
    try:
        for row in process(settings, file, inputs, context):
            rows.append(row)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        reason = clean_text(" ".join(str(error).split()))
        if is_out_of_memory(error):
            raise MemoryError(f"memory ran out while {file.name} was read ({reason})") from error
        # A ValueError of ours is a complete sentence; any other exception also needs its type.
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
            reason = f"it cannot be processed ({type(error).__name__}: {reason})"
        rows.append({"error": reason})
    return rows


def valid_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that contain a result and not an error."""
    return [row for row in rows if row["error"] is None]
