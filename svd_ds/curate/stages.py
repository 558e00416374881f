"""What a stage is, and how it is run: over raw files, by a pool of processes, each file once.

A stage's table lies in a folder whose name tells the stage's settings and, through their names, those of the
stages that it builds on. Other settings lead to another folder: what was found under them stays, and is found
again when they come back. A stage asks its table which files are done, in the state in which they are now,
and works on the rest.
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
from svd_ds.curate.table import Known, Row, Table
from svd_ds.data.quarantine import is_out_of_memory
from svd_ds.data.sidecar import clean_text
from svd_ds.data.workers import exit_with_parent

FLUSH_SECONDS = 10.0
"""A killed run has lost at most what it found in so long."""
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say something of the machine and nothing of the file that was read."""
TIMEOUT = 3600.0
"""Seconds that a stage gives a file: long enough to encode a long film."""


@dataclass(frozen=True)
class Place:
    """Where a stage works."""

    out: Path
    here: Path
    """The stage's own folder below it."""


Work = Callable[[Any, RawFile, Known, Place], Iterator[Row]]
"""(settings, file, what earlier stages know of it, place) -> rows. A ValueError tells why the file gives
none, or no more."""
Job = tuple[RawFile, Known]
Found = dict[str, list[Row]]
"""A stage's rows by raw file."""


@dataclass(frozen=True)
class Stage:
    """One step from raw files to clips."""

    name: str
    work: Work
    columns: Mapping[str, pa.DataType]
    settings: Any = None
    """A frozen dataclass of plain values, or None."""
    after: tuple[Stage, ...] = ()
    prepare: Callable[[Any], object] | None = None
    """Loads the model that the settings name. One process then works for all files, and a model that cannot
    be loaded is the user's mistake, not the files'."""
    version: int = 1
    """Goes up when the same settings come to give other rows."""

    def fingerprint(self) -> str:
        settings = asdict(self.settings) if self.settings else {}
        settings.pop("device", None)  # where a model runs decides nothing
        content = [self.name, self.version, settings, [stage.fingerprint() for stage in self.after]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, out: Path) -> Path:
        return out / "stages" / f"{self.name}-{self.fingerprint()}"


@dataclass
class Runner:
    """Runs stages over one set of raw files."""

    files: Sequence[RawFile]
    out: Path
    num_workers: int
    """Processes; 0 works in this one, where no file can be ended that takes too long."""
    progress: Progress
    timeout: float = TIMEOUT
    """Seconds after which a stage gives a file up. One that another run gave up sooner is tried again."""
    found: dict[str, Found] = field(default_factory=dict)
    """By stage, what was found."""
    _pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, stage: Stage) -> None:
        """Work on every file that is not done and that the stages before found something in."""
        table = Table(stage.folder(self.out), stage.columns)
        is_file = FolderListings().is_file
        stamps = {file.name: file.stamp(is_file) for file in self.files}
        found = {
            name: rows
            for name, rows in table.read().items()
            if rows and rows[0]["stamp"] == stamps.get(name) and not self._has_longer(rows[-1])
        }
        jobs = []
        for file in self.files:
            known = {before.name: sound(self.found[before.name].get(file.name, ())) for before in stage.after}
            if all(known.values()) and file.name not in found:
                jobs.append((file, known))
        if jobs and stage.prepare is not None:
            stage.prepare(stage.settings)
        task = self.progress.add_task(stage.name, total=len(jobs))
        fresh: list[Row] = []
        flushed = time.monotonic()
        work = partial(work_on, stage.work, stage.settings, Place(self.out, stage.folder(self.out)))
        try:
            for name, rows in self._results(work, jobs, alone=stage.prepare is not None):
                found[name] = [{"video": name, "stamp": stamps[name], "error": None, **row} for row in rows]
                fresh += found[name]
                self.progress.advance(task)
                if time.monotonic() > flushed + FLUSH_SECONDS:
                    table.add(fresh)
                    fresh, flushed = [], time.monotonic()
        finally:
            table.add(fresh)
        self.found[stage.name] = found

    def _has_longer(self, row: Row) -> bool:
        """Whether a file was given up by a run that had less time for it."""
        seconds = row.get("given_up_after")
        return seconds is not None and seconds < self.timeout

    def _results(
        self, work: Callable[[Job], list[Row]], jobs: Sequence[Job], alone: bool
    ) -> Iterator[tuple[str, list[Row]]]:
        if alone or not self.num_workers:
            for job in jobs:
                yield job[0].name, work(job)
            return
        waiting = list(reversed(jobs))
        with TemporaryDirectory() as folder:
            timed = _Timed(work, self.timeout, Path(folder))
            while waiting:
                suspects: list[Job] = []
                self._pool = self._pool or _pool(self.num_workers)
                yield from _drain(self._pool, timed, waiting, suspects, most=2 * self.num_workers)
                if not suspects:
                    continue
                self.close()
                late = [timed.was_late(job) for job in suspects]
                for job, was_late in zip(suspects, late, strict=True):
                    if was_late:
                        yield job[0].name, timed.refusal
                    elif any(late):
                        waiting.append(job)
                    else:
                        # One of these ended its process, as a decoder may on a hostile file.
                        yield job[0].name, _result_alone(timed, job)

    def close(self) -> None:
        """End the processes; jobs that have not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _drain(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], list[Row]],
    waiting: list[Job],
    suspects: list[Job],
    most: int,
) -> Iterator[tuple[str, list[Row]]]:
    """Results as they come; jobs move to `suspects` that were under way when a process ended."""
    running: dict[Future[list[Row]], Job] = {}
    while waiting or running:
        while waiting and len(running) < most:
            job = waiting.pop()
            try:
                running[pool.submit(work, job)] = job
            except BrokenProcessPool:
                suspects.append(job)
                break
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                suspects.append(job)
            else:
                yield job[0].name, future.result()
        if suspects:
            suspects += running.values()
            return


@dataclass(frozen=True)
class _Timed:
    """Work that ends its process when it takes too long."""

    work: Callable[[Job], list[Row]]
    seconds: float
    folder: Path
    """Of a file for each job under way."""

    def __call__(self, job: Job) -> list[Row]:
        with self._log(job).open("w") as log:
            # The one timer of Python's that a decoder cannot hold up: it needs no interpreter.
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=log)
            try:
                return self.work(job)
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._log(job).unlink()

    def was_late(self, job: Job) -> bool:
        """Whether it ended its process: then it has told where it was."""
        return self._log(job).is_file() and self._log(job).stat().st_size > 0

    @property
    def refusal(self) -> list[Row]:
        return [{"error": f"reading it takes more than {self.seconds:g} s", "given_up_after": self.seconds}]

    def _log(self, job: Job) -> Path:
        return self.folder / job[0].key


def _result_alone(timed: _Timed, job: Job) -> list[Row]:
    """A job's rows, or why it has none, from a process of its own."""
    with _pool(1) as pool:
        try:
            return pool.submit(timed, job).result()
        except BrokenProcessPool:
            return timed.refusal if timed.was_late(job) else [{"error": "reading it ends the process"}]


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # Spawned: a fork of a process with threads of torch or OpenCV may hang.
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    exit_with_parent()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def work_on(work: Work, settings: Any, place: Place, job: Job) -> list[Row]:
    """All rows of a file; where it is refused, the last of them says why.

    Whatever a file makes a decoder, a detector or our own code raise is the refusal of this file: it costs no
    other one.

    Raises:
        OSError, MemoryError: a fault of the machine, such as a full disk; the next run reads the file again.
    """
    file, known = job
    rows: list[Row] = []
    try:
        for row in work(settings, file, known, place):
            rows.append(row)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        reason = clean_text(" ".join(str(error).split()))
        if is_out_of_memory(error):
            raise MemoryError(f"memory ran out while {file.name} was read ({reason})") from error
        # A ValueError is worded for this place; of another exception its kind is half of what it says.
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
            reason = f"it cannot be processed ({type(error).__name__}: {reason})"
        rows.append({"error": reason})
    return rows


def sound(rows: Sequence[Row]) -> list[Row]:
    """The rows that say what was found."""
    return [row for row in rows if row["error"] is None]
