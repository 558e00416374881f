"""Time limit for reads: if a file system or a server hangs, the run ends with an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class ReadTimeoutError(OSError):
    """Error of a read that took too long; the sample itself may be valid."""


def with_timeout(action: Callable[[], Result], seconds: float, sentence: str) -> Result:
    """Run `action` with a time limit.

    A read that hangs cannot be interrupted: its thread is abandoned.

    Args:
        action: function that reads.
        seconds: limit in seconds.
        sentence: message of the error if the limit is exceeded.

    Raises:
        ReadTimeoutError: `action` did not return within `seconds`.
        Exception: any error of `action`.
    """
    result: Future[Result] = Future()
    _reading_queue(os.getpid()).put((action, result))
    if not wait([result], seconds).done:
        _reading_queue.cache_clear()
        raise ReadTimeoutError(sentence)
    return result.result()


@cache
def _reading_queue(process: int) -> SimpleQueue[tuple[Callable[[], Any], Future[Any]]]:
    """Return the queue of a process's reading thread, which is started once: starting a thread takes as long
    as a read. A forked process needs its own thread, so the queue is cached by process id."""
    tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def work() -> None:
        while True:
            action, result = tasks.get()
            try:
                result.set_result(action())
            except BaseException as error:
                result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return tasks
