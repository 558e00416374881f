"""Worker processes that outlive the run's signals, but not the run.

Workers come from a fork server, a process without threads: forking the training process itself would copy
locks that gloo's, OpenMP's and CUDA's threads may hold. Each imports the main module anew, so a door's
module should import little before its `if __name__ == "__main__"`.

SLURM sends SIGTERM and SIGUSR1 to every process of a job step, not only to the ranks, and a rank that is told
to write its checkpoint still needs its workers. So these signals are blocked in them; in return the main
process kills them when it exits, and they end by themselves when it is killed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start(dataset: IterableDataset[Any], num_workers: int, prefetch: int, module: str) -> Iterator[Any]:
    """Iterate over copies of `dataset` in `num_workers` processes, one item of each in turn.

    Args:
        prefetch: items that each process holds ready.
        module: of `dataset`; the server imports it once for all workers.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([module])
    before = multiprocessing.active_children()
    with _run_signals_blocked():
        # Started by itself, because its start ends with signals unblocked.
        resource_tracker.ensure_running()
    with _run_signals_blocked():
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            multiprocessing_context=server,
            worker_init_fn=end_with_parent,
        )
        items = iter(loader)
    # Python ends its children by SIGTERM and waits for them; this runs before that.
    atexit.register(_kill, [child for child in multiprocessing.active_children() if child not in before])
    return items


@contextmanager
def _run_signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the block; a signal that arrives meanwhile comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(_: int = 0) -> None:
    """In a worker, which is forked by a server or waits at a queue: nothing else ends it when the run is
    killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
