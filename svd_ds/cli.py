"""How every command of the project ends: exit code 0, or one clear sentence and exit code 2."""

from __future__ import annotations

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

EXIT_PEER_FAILED = 1
"""Code of a rank that ends because another did. The lowest: srun reports the highest of all ranks."""
USER_ERRORS = (ValueError, OSError)
"""What our own checks raise: a user's mistake, or the outside world's. Anything else is a bug of ours."""
USER_PATH_ERRORS = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
)
"""Of the errors of files, those of what was named."""


def is_retryable(error: BaseException) -> bool:
    """Whether the same command may fare better later: a disk that is full or away, as against a wrong value
    or name."""
    return isinstance(error, OSError) and not isinstance(error, USER_PATH_ERRORS)


def same_kind(error: BaseException, sentence: str) -> ValueError | OSError:
    """`sentence` in the place of `error`, by a kind that `is_retryable` judges the same."""
    return OSError(sentence) if is_retryable(error) else ValueError(sentence)


def mask_tracebacks() -> None:
    """Mask the credentials in the tracebacks with which Python ends this process."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = redact("".join(traceback.format_exception(kind, error, trace)))
        with suppress(OSError):
            sys.stderr.write(text)

    sys.excepthook = show


def wants_traceback() -> bool:
    return "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"


class LossyStream:
    """stdout or stderr of a command, with credentials masked. The command must not end because nobody reads
    it any more: a closed pipe (`| head`), a terminal that hung up, a log file on a full disk. After the first
    write that fails, nothing is written."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lost = False

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                self._stream.write(redact(text))
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        self._lost = True
        # Python flushes what is left in its buffer when it ends, and would end with another exit code.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr that drops what nobody reads, instead of raising."""
    stream = LossyStream(sys.stderr if stderr else sys.stdout)
    return Console(file=cast(IO[str], stream), soft_wrap=True, highlight=False)


def print_line(text: str) -> None:
    """Print a line on stdout at once; raises nothing where nobody reads it."""
    open_console().print(printable(text), markup=False)


def printable(text: str) -> str:
    """Replace what a terminal would obey rather than show, except ends of lines: names of files come from
    strangers."""
    hidden = ("Cc", "Cf", "Cs")
    return "".join(
        "\ufffd" if char != "\n" and unicodedata.category(char) in hidden else char for char in text
    )


def print_error(error: BaseException | str, who: str = "") -> None:
    """Print `error` as one sentence on stderr; `who` names the rank where there are several. Raises nothing
    where nobody reads it."""
    sentence = printable(" ".join(str(error).split())) or type(error).__name__
    open_console(stderr=True).print(f"[bold red]error:[/] {escape(who + sentence)}")


def run_cli(main: Callable[[], None]) -> None:
    """Run a command; end the process with 2 and one sentence on bad input, 130 when interrupted.

    A traceback is shown for our own bugs, and for everything with `--debug` or HYDRA_FULL_ERROR=1.
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
