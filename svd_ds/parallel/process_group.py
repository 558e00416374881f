"""Life of a rank's process group, up to the end of the process.

With NCCL, `destroy_process_group` does not return while other ranks sit in a collective, and neither does the
exit of the interpreter, which runs NCCL's destructors. So the ranks destroy their communicators only when all
of them leave together: after success, or after a SharedError. A rank that fails alone reports its error and
ends its process at once (`leave`); the launcher then ends the others.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from svd_ds.parallel import env as environment
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.env import DEFAULT_TIMEOUT, Env


@contextmanager
def process_group(env: Env, timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[None]:
    """Initialise torch.distributed, and destroy it if all ranks leave together.

    Args:
        timeout: limit of the rendezvous and of every collective.

    Raises:
        ValueError, OSError: see `Env.check_gpus`.
    """
    environment.init(env, timeout)
    try:
        yield
    except BaseException as error:
        if not leaves_alone(error, env):
            # The error of the block says more than one of a GPU that can no longer be used.
            with suppress(RuntimeError):
                environment.shutdown()
        raise
    environment.shutdown()


def leaves_alone(error: BaseException, env: Env) -> bool:
    """Return True if other ranks may not know of the error, and wait for this rank in a collective."""
    return env.world > 1 and not isinstance(error, SharedError)


@contextmanager
def leave_on_error(env: Env) -> Iterator[None]:
    """Show the traceback of an error of this rank alone, and end its process; for programs without a
    RankSession."""
    try:
        yield
    except BaseException as error:
        if not leaves_alone(error, env):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)


def leave(code: int) -> NoReturn:
    """End this process and its data workers at once, without the exit of the interpreter.

    Args:
        code: exit code of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    for child in multiprocessing.active_children():
        with suppress(OSError):
            child.kill()
    os._exit(code)
