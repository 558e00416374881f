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

EXIT_SECONDS = 0.5
"""How long a worker whose pipe has broken may take to end."""
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def iterate_in_workers(
    dataset: IterableDataset[Any], num_workers: int, prefetch: int, module: str, rank: int = 0
) -> Iterator[Any]:
    """Iterate over copies of `dataset` in `num_workers` processes, one item of each in turn.

    Args:
        prefetch: items that each process holds ready.
        module: of `dataset`; the server imports it once for all workers.
        rank: of this process, for error messages.

    Raises:
        OSError: while iterating, where a worker was killed or has ended by itself.
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
            worker_init_fn=exit_with_parent,
        )
        items = iter(loader)
    # Python ends its children by SIGTERM and waits for them; this runs before that.
    children = [child for child in multiprocessing.active_children() if child not in before]
    atexit.register(_kill, children)
    return _until_one_dies(items, children, f"{num_workers} data workers of rank {rank}")


def _until_one_dies(items: Iterator[Any], workers: list[Any], which: str) -> Iterator[Any]:
    """The items. What a dead worker makes torch raise (RuntimeError, EOFError, ConnectionError, ...) does not
    say that it died: its exit code does."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            codes = [code for worker in workers if (code := _exit_code(worker))]
            if not codes:
                raise
            raise OSError(_epitaph(codes, which)) from error
        yield item


def _exit_code(worker: Any) -> int | None:
    """The exit code of a worker that has ended, or is just ending."""
    worker.join(EXIT_SECONDS)
    return worker.exitcode


def _epitaph(codes: list[int], which: str) -> str:
    killed = [-code for code in codes if code < 0]
    if signal.SIGKILL in killed:
        return (
            f"one of the {which} was killed by signal 9 (SIGKILL), most likely because the machine or the "
            "job ran out of memory: fewer data.num_workers or a smaller data.prefetch need less"
        )
    if killed:
        name = signal.strsignal(killed[0]) or "unknown"
        return f"one of the {which} was killed by signal {killed[0]} ({name}): the rank's log may say more"
    return f"one of the {which} ended with exit code {codes[0]}: the rank's log may say more"


@contextmanager
def _run_signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the block; a signal that arrives meanwhile comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent(_: int = 0) -> None:
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
