"""Prefetching: order, what belongs to a batch, errors, and a thread that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_ds.batch import Batch, Draws
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.loader import Loader
from svd_ds.data.quarantine import Fault
from svd_ds.training import prefetch
from svd_ds.training.prefetch import Prefetcher
from tests.videos import write_shards

CPU = torch.device("cpu")
WAIT = 20.0
"""Time in seconds after which a thread that should have moved counts as stuck."""


def batch(number: int) -> Batch:
    frames = torch.full((1, 2, 3, 8, 8), number, dtype=torch.uint8)
    return Batch((f"s{number}",), (number,), frames, ("",), {"fps": torch.ones(1)})


def draw(given: Batch) -> Batch:
    numbers = torch.full((1,), float(given.ordinals[0]))
    return replace(given, draws=Draws(*[numbers] * 6))


class Source:
    """Loader of batches 0, 1, ... `last` - 1 that counts what was read, then ends or fails."""

    def __init__(self, last: int, error: BaseException | None = None) -> None:
        self.last, self.error, self.num_read = last, error, 0
        self.faults: list[Fault] = []

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        for number in range(self.last):
            self.num_read += 1
            self.faults.append(Fault(f"bad-{number}", "0.tar", "it is junk"))
            yield batch(number), Cursor(number + 1, "data")
        if self.error is not None:
            raise self.error

    def pop_faults(self) -> list[Fault]:
        popped, self.faults = self.faults, []
        return popped

    def prefetcher(self) -> Prefetcher:
        return Prefetcher(iter(self), self.pop_faults, draw, CPU)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def prefetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_each_with_its_draws_cursor_and_faults() -> None:
    with Source(5).prefetcher() as batches:
        found = list(batches)
    assert [item.host.ordinals for item in found] == [(number,) for number in range(5)]
    assert [item.cursor.next_ordinal for item in found] == [1, 2, 3, 4, 5]
    assert [[fault.id for fault in item.faults] for item in found] == [[f"bad-{n}"] for n in range(5)], (
        "faults of batches that were read ahead are not counted yet"
    )
    for number, item in enumerate(found):
        assert item.on_device.draws is not None and item.on_device.draws.u_B.tolist() == [number]
        assert torch.equal(item.on_device.frames_BTCHW, batch(number).frames_BTCHW)


def test_next_batches_are_prepared_while_one_is_computed_and_no_more_than_two() -> None:
    source = Source(10)
    with source.prefetcher() as batches:
        assert source.num_read == 0, "nothing is read before it is needed"
        next(batches)
        wait_until(lambda: source.num_read == 3)
        time.sleep(0.05)
        assert source.num_read == 3, "one waits in the queue, one for the queue"


@pytest.mark.parametrize("error", [ValueError("x is 3"), OSError("disk"), ZeroDivisionError("bug")])
def test_errors_of_the_loader_are_raised_with_their_type_after_the_batches_before_them(
    error: Exception,
) -> None:
    with Source(2, error).prefetcher() as batches:
        assert [next(batches).host.ordinals for _ in range(2)] == [(0,), (1,)]
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                next(batches)


def test_error_of_a_draw_is_raised() -> None:
    def fail(given: Batch) -> Batch:
        raise RuntimeError("no memory for the draws")

    with (
        pytest.raises(RuntimeError, match="no memory"),
        Prefetcher(iter(Source(3)), list, fail, CPU) as batches,
    ):
        next(batches)
    assert not prefetching_threads()


def test_thread_ends_with_the_run_also_after_an_error_of_the_main_thread() -> None:
    source = Source(10**9)
    with pytest.raises(KeyboardInterrupt), source.prefetcher() as batches:
        next(batches)
        wait_until(lambda: source.num_read == 3)
        raise KeyboardInterrupt
    assert not prefetching_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_read_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CLOSE_SECONDS", 0.1)
    release = threading.Event()

    def hanging() -> Iterator[tuple[Batch, Cursor]]:
        yield batch(0), Cursor(1, "data")
        release.wait(WAIT)

    started = time.monotonic()
    with Prefetcher(hanging(), list, draw, CPU) as batches:
        next(batches)
    assert time.monotonic() - started < 5 and prefetching_threads()
    release.set()
    wait_until(lambda: not prefetching_threads())


def test_signals_wake_the_main_thread_that_waits_for_a_batch() -> None:
    """A signal that is delivered to the prefetching thread would leave the main thread asleep."""
    handled: list[int] = []
    ready, masks = threading.Event(), []

    def waiting() -> Iterator[tuple[Batch, Cursor]]:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        ready.wait(WAIT)
        yield batch(0), Cursor(1, "data")

    def interrupt(number: int, frame: Any) -> None:
        handled.append(number)
        ready.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        main = threading.get_ident()
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGUSR1)).start()
        with Prefetcher(waiting(), list, draw, CPU) as batches:
            assert next(batches).host.ordinals == (0,)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP} <= masks[0]


def test_loader_with_worker_processes_gives_the_same_batches(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [5, 4])

    def read(num_workers: int) -> list[tuple[tuple[int, ...], int]]:
        data = DataConfig(str(shards), 2, 16, 16, fps=0, num_workers=num_workers)
        loader = Loader(data, 0, 0, 1, BatchConfig(2))
        with Prefetcher(iter(loader), loader.pop_faults, draw, CPU) as batches:
            items = [next(batches) for _ in range(4)]
        return [(item.host.ordinals, int(item.host.frames_BTCHW.sum())) for item in items]

    assert read(0) == read(2)
    assert not prefetching_threads()


KILLED_WORKER = """
import multiprocessing, os, signal, sys
from pathlib import Path
import torch
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.training.prefetch import Prefetcher

if __name__ == "__main__":
    loader = Loader(DataConfig(sys.argv[1], 2, 16, 16, fps=0, num_workers=2), 0, 0, 1, BatchConfig(2))
    with Prefetcher(iter(loader), loader.pop_faults, lambda batch: batch, torch.device("cpu")) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        try:
            for _ in batches:
                pass
        except OSError as error:
            print(error)
"""


def test_death_of_a_worker_ends_the_run_in_words(tmp_path: Path) -> None:
    """The loader's processes are started by the thread, to which torch reports their death otherwise."""
    script = tmp_path / "script.py"
    script.write_text(KILLED_WORKER)
    process = subprocess.run(
        [sys.executable, script, write_shards(tmp_path / "shards", [5, 4])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert process.stdout.startswith("one of the 2 data workers of rank 0 was killed by signal 9 (SIGKILL)")
    assert process.stderr == ""


class FakeStream:
    """CUDA stream that records the order of copies and waits."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name} copied")
        return "copied"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_on_a_gpu_the_copies_are_pinned_asynchronous_and_kept_until_they_were_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calls alone: on this machine nothing is copied."""
    log: list[str] = []
    side, current = FakeStream(log, "side"), FakeStream(log, "current")

    class Inside:
        def __init__(self, stream: FakeStream) -> None:
            log.append(f"in {stream.name}")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            log.append("out")

    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        assert tensor.data_ptr() in pinned and non_blocking and device.type == "cuda"
        log.append("copy")
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(f"thread on {device}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(stream.name))
    with Prefetcher(iter(Source(1)), list, draw, torch.device("cuda", 3)) as batches:
        item = next(batches)
    num_tensors = 2 + 6
    assert log == [
        "thread on cuda:3",
        *("in side", *["copy"] * num_tensors, "side copied", "out"),
        *("current waits for copied", *["current"] * num_tensors),
    ]
    assert item.host.frames_BTCHW.data_ptr() in pinned, "a step is computed again from pinned memory"
