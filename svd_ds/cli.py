"""Common parts of all commands: exit codes, errors in one sentence, the console, malloc settings."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape

from svd_ds.credentials import redact

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
MAX_MMAP_THRESHOLD = 32 << 20
"""Largest value that glibc accepts for M_MMAP_THRESHOLD, in bytes."""
EXIT_PEER_FAILED = 1
"""Exit code of a rank that ends because another rank did. It is the lowest code of an error, because srun
reports the highest code of all ranks."""
USER_ERRORS = (ValueError, OSError)
"""Errors of our checks: a user's mistake, or a failure of disk or network. Any other error is a bug."""
USER_PATH_ERRORS = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
)
"""Errors of files whose cause is the path that the user named."""


def is_retryable(error: BaseException) -> bool:
    """Return True if the same command may succeed later: after a full disk, but not after a wrong value or
    path."""
    return isinstance(error, OSError) and not isinstance(error, USER_PATH_ERRORS)


def same_kind(error: BaseException, sentence: str) -> ValueError | OSError:
    """Make an error with the message `sentence` that is retryable if `error` is."""
    return OSError(sentence) if is_retryable(error) else ValueError(sentence)


def mask_tracebacks() -> None:
    """Mask the credentials in the traceback of an uncaught exception."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = redact("".join(traceback.format_exception(kind, error, trace)))
        with suppress(OSError):
            sys.stderr.write(text)

    sys.excepthook = show


def wants_traceback() -> bool:
    """Return True with --debug or HYDRA_FULL_ERROR=1."""
    return "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"


class LossyStream:
    """stdout or stderr that masks credentials and ignores errors.

    A command must not end because its output can no longer be written: to a closed pipe (`| head`), a closed
    terminal, or a log file on a full disk. After the first write that fails, nothing is written.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        """Write a text with its credentials masked."""
        if not self._is_lost:
            try:
                self._stream.write(redact(text))
            except OSError:
                self._discard_output()
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if not self._is_lost:
            try:
                self._stream.flush()
            except OSError:
                self._discard_output()

    def _discard_output(self) -> None:
        self._is_lost = True
        # Python flushes its buffer at exit, and an error then would change the exit code.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_console(stderr: bool = False) -> Console:
    """Open a console on stdout or stderr that ignores write errors."""
    stream = LossyStream(sys.stderr if stderr else sys.stdout)
    return Console(file=cast(IO[str], stream), soft_wrap=True, highlight=False)


def print_line(text: str) -> None:
    """Print a line on stdout and flush it; write errors are ignored."""
    open_console().print(printable(text), markup=False)


def printable(text: str) -> str:
    """Replace control characters other than newlines: untrusted file names must not act on the terminal."""
    hidden = ("Cc", "Cf", "Cs")
    return "".join(
        "\ufffd" if char != "\n" and unicodedata.category(char) in hidden else char for char in text
    )


def print_error(error: BaseException | str, prefix: str = "") -> None:
    """Print `error` as one line on stderr; write errors are ignored.

    Args:
        prefix: text before the sentence, such as "rank 3: ".
    """
    sentence = printable(" ".join(str(error).split())) or type(error).__name__
    open_console(stderr=True).print(f"[bold red]error:[/] {escape(prefix + sentence)}")


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next training step. With another C library do nothing.

    By default glibc returns the memory of every large tensor to the system. Page faults when it is allocated
    again take a large share of a step on a CPU.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def run_cli(main: Callable[[], None]) -> None:
    """Run a command; exit with code 2 and one sentence on a user error, with 130 when interrupted.

    A traceback is shown for bugs, and for every error with --debug or HYDRA_FULL_ERROR=1.
    """
    mask_tracebacks()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (*USER_ERRORS, MemoryError) as error:
        if wants_traceback():
            raise
        print_error(error)
        sys.exit(2)
