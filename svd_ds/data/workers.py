"""Worker processes that ignore the signals of a run and end with its process.

Workers are forked by a fork server, a process without threads: forking the training process itself would copy
locks that threads of gloo, OpenMP and CUDA may hold. Each worker imports the main module anew, so the module
of a command should import little before its `if __name__ == "__main__"`.

Slurm sends SIGTERM and SIGUSR1 to every process of a job step, not only to the ranks, and a rank that writes
its last checkpoint still needs its workers. So these signals are blocked in the workers; the main process
kills them when it exits, and they end by themselves when it is killed.
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
"""Time in seconds that a worker with a broken pipe may take to exit."""
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the main process handles."""


def iterate_in_workers(
    dataset: IterableDataset[Any], num_workers: int, prefetch: int, module: str, rank: int = 0
) -> Iterator[Any]:
    """Iterate over copies of a data set in worker processes, taking an item of each in turn.

    Args:
        dataset: data set; each process iterates over a copy.
        num_workers: number of processes.
        prefetch: number of items that each process prepares in advance.
        module: module of `dataset`, which the fork server imports once for all workers.
        rank: rank of this process, for error messages.

    Raises:
        OSError: a worker was killed or exited (raised by the iterator).
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([module])
    before = multiprocessing.active_children()
    with _run_signals_blocked():
        # Started separately: when it starts, it unblocks the signals.
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
    # Python sends SIGTERM to its children on exit and waits for them; this runs before that.
    children = [child for child in multiprocessing.active_children() if child not in before]
    atexit.register(_kill, children)
    return _check_workers(items, children, f"{num_workers} data workers of rank {rank}")


def _check_workers(items: Iterator[Any], workers: list[Any], group: str) -> Iterator[Any]:
    """Yield the items, and report the death of a worker; `group` names the workers in the message.

    The errors of torch after the death of a worker (RuntimeError, EOFError, ConnectionError, ...) do not say
    that it died; its exit code does.

    Raises:
        OSError: a worker died; the message has its signal or exit code.
    """
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            codes = [code for worker in workers if (code := _exit_code(worker))]
            if not codes:
                raise
            raise OSError(_describe_death(codes, group)) from error
        yield item


def _exit_code(worker: Any) -> int | None:
    """Return the exit code of a worker that has ended or is ending; None if it is alive."""
    worker.join(EXIT_SECONDS)
    return worker.exitcode


def _describe_death(codes: list[int], group: str) -> str:
    """Describe why a worker died, from the exit codes of the dead workers."""
    killed = [-code for code in codes if code < 0]
    if signal.SIGKILL in killed:
        return (
            f"one of the {group} was killed by signal 9 (SIGKILL), most likely because the machine or the "
            "job ran out of memory: reduce data.num_workers or data.prefetch"
        )
    if killed:
        name = signal.strsignal(killed[0]) or "unknown"
        return f"one of the {group} was killed by signal {killed[0]} ({name}): the rank's log may say more"
    return f"one of the {group} ended with exit code {codes[0]}: the rank's log may say more"


@contextmanager
def _run_signals_blocked() -> Iterator[None]:
    """Block RUN_SIGNALS; processes started inside inherit that, and signals are delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent(_: int = 0) -> None:
    """Exit this worker process when its parent exits: a worker that waits at a queue would not notice."""
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
