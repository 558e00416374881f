"""Prefetching of a rank: while a micro-batch is computed, a thread prepares the next ones.

    loader -> Objective.draw -> pinned host memory -> device, on a CUDA stream of its own

The stream of the computation waits for the copies, the host does not. On CPUs there is nothing to copy.

Everything that the thread yields belongs to one micro-batch: its cursor, and the samples that were replaced
in it. A run that ends or resumes therefore counts what was computed, and not what was read ahead.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.data.quarantine import Fault
from svd_ds.jobs.signals import SIGNALS

CLOSE_SECONDS = 30.0
"""Time in seconds that the end of a run waits for the thread, which may be at a read that hangs."""
CLOSE_SECONDS_AFTER_ERROR = 2.0
"""Time in seconds that a run waits for the thread if it ends by an error: other ranks are waiting."""


@dataclass(frozen=True)
class PrefetchedBatch:
    """A micro-batch that is ready to be computed."""

    host: Batch
    """The batch and its draws in host memory, pinned if the device is a GPU, from which a step is computed
    again."""
    on_device: Batch
    """The same on the device; copies may still be under way, and the current stream waits for them."""
    cursor: Cursor
    """Cursor after the global step of the batch."""
    faults: tuple[Fault, ...] = ()
    """Samples that were replaced in it."""


class Prefetcher:
    """Iterator over the micro-batches of a rank, which a thread prepares: one waits, and one is under way.

    Errors of the thread, StopIteration too, are raised by `next`, after the batches before them. As a context
    manager it ends the thread at its exit.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Batch, Cursor]],
        pop_faults: Callable[[], list[Fault]],
        draw: Callable[[Batch], Batch],
        device: torch.device,
    ) -> None:
        """
        Args:
            batches: iterator of the loader; only the thread uses it.
            pop_faults: returns the samples that were replaced since the last call.
            draw: adds the random numbers of a batch, in host memory.
        """
        self._batches, self._pop_faults, self._draw, self._device = batches, pop_faults, draw, device
        self._ready: queue.Queue[tuple[PrefetchedBatch, torch.cuda.Event | None] | BaseException]
        self._ready = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(CLOSE_SECONDS if kind is None else CLOSE_SECONDS_AFTER_ERROR)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PrefetchedBatch:
        """Wait for the next micro-batch on the host, and for its copies on the current stream."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()
        found = self._end or self._ready.get()
        if isinstance(found, BaseException):
            self._end = found
            raise found
        batch, copied = found
        if copied is not None:
            _wait_for_copy(batch.on_device, copied, torch.cuda.current_stream(self._device))
        return batch

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """End the thread. It is left behind if it is still reading after `timeout` seconds."""
        self._closed.set()
        if self._end is None:
            self._end = StopIteration()
        while not self._ready.empty():
            self._ready.get_nowait()  # the thread may wait for a free place
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        # Python's handlers run in the main thread, so a signal must wake that one.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            stream = _copy_stream(self._device)
            for batch, cursor in self._batches:
                self._ready.put(self._prepare(batch, cursor, stream))
                if self._closed.is_set():
                    return
            raise StopIteration
        except BaseException as error:
            self._ready.put(error)
        finally:
            # Here, because a generator cannot be closed while another thread runs it.
            del self._batches

    def _prepare(
        self, batch: Batch, cursor: Cursor, stream: torch.cuda.Stream | None
    ) -> tuple[PrefetchedBatch, torch.cuda.Event | None]:
        faults, host = tuple(self._pop_faults()), self._draw(batch)
        if stream is None:
            return PrefetchedBatch(host, host.to(self._device), cursor, faults), None
        host = host.map(Tensor.pin_memory)
        with torch.cuda.stream(stream):
            on_device = host.to(self._device)
            return PrefetchedBatch(host, on_device, cursor, faults), stream.record_event()


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies from this thread; None for a CPU."""
    if device.type != "cuda":
        return None
    # The current device is a property of the thread; pinning memory uses it.
    torch.cuda.set_device(device)
    return torch.cuda.Stream(device)


def _wait_for_copy(batch: Batch, copied: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Make `stream` wait for the copies of a batch, and the allocator keep its memory until `stream` has used
    it."""
    stream.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    batch.map(keep)
