"""How every command of the project ends: exit code 0, or one clear sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

OF_ANOTHER = 1
"""Code of a rank that ends because another did. The lowest: srun reports the highest of all ranks."""
USER_ERRORS = (ValueError, OSError)
"""What our own checks raise: a user's mistake, or the outside world's. Anything else is a bug of ours."""
WRONG_NAMES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
"""Of the errors of files, those of what was named."""


def may_pass(error: BaseException) -> bool:
    """Whether the same command may fare better later: a disk that is full or away, as against a wrong value
    or name."""
    return isinstance(error, OSError) and not isinstance(error, WRONG_NAMES)


def of_its_kind(error: BaseException, sentence: str) -> ValueError | OSError:
    """`sentence` in the place of `error`, by a kind that `may_pass` judges the same."""
    return OSError(sentence) if may_pass(error) else ValueError(sentence)


def wants_traceback() -> bool:
    return "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"


def print_error(error: BaseException | str, who: str = "") -> None:
    """Print `error` as one sentence on stderr; `who` names the rank where there are several."""
    sentence = " ".join(str(error).split()) or type(error).__name__
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(who + sentence)}")


def run_door(main: Callable[[], None]) -> None:
    """Run a command; end the process with 2 and one sentence on bad input, 130 when interrupted.

    A traceback is shown for our own bugs, and for everything with `--debug` or HYDRA_FULL_ERROR=1.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        if wants_traceback():
            raise
        print_error(error)
        sys.exit(2)
