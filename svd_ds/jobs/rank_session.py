"""Session of one rank: its log, its watchdog, and how an error ends it.

    logs/rank-00003.log    stderr of rank 3 in all restarts: warnings, tracebacks, stack traces of a hang
    logs/nccl-00003.*.log  messages of its NCCL, one file per host and process
    logs/outcome.json      how the newest restart ended (svd_ds.jobs.outcome)

The launcher reads the outcome to decide whether to restart the run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO, cast

from svd_ds.cli import EXIT_PEER_FAILED, USER_ERRORS, LossyStream, is_retryable, print_error
from svd_ds.credentials import redact
from svd_ds.fsync_io import name_errors
from svd_ds.jobs.out_of_memory import explain_out_of_memory, is_out_of_memory
from svd_ds.jobs.outcome import (
    BAD_NODES,
    FAILED,
    FINISHED,
    INTERRUPTED,
    PREEMPTED,
    REFUSED,
    JobOutcome,
    outcome_path,
)
from svd_ds.jobs.requeue import is_managed_by_job
from svd_ds.jobs.watchdog import Watchdog, WatchdogConfig
from svd_ds.parallel.collectives import SharedError, is_peer_failure
from svd_ds.parallel.env import Env, host, restart_id
from svd_ds.parallel.process_group import leave, leaves_alone
from svd_ds.run_folder import RunFolder


@dataclass(frozen=True)
class _ErrorReport:
    """Report of an error of this rank."""

    code: int
    """Exit code of the process."""
    sentence: str | None = None
    """Line for the console; None if another rank prints it."""
    prefix: str = ""
    """Text before the sentence that names the rank."""


class RankSession:
    """Context manager around everything that a rank does. It redirects stderr to the rank's log, and turns an
    error into an outcome, one line on the console, and an exit code.

    Only the first rank that records the outcome prints its error, so the console gets one line however many
    ranks fail. If the disk fails, log and outcome may be lost; the console gets the line in any case.

    A rank of several that fails alone ends its process here: see svd_ds.parallel.process_group.

    Args:
        debug: also show the traceback of the error.
        memory_settings: values of the keys of `out_of_memory.LEAST_MEMORY`, for its sentence.
    """

    def __init__(
        self,
        folder: RunFolder,
        env: Env,
        watchdog: WatchdogConfig,
        debug: bool = False,
        memory_settings: Mapping[str, object] | None = None,
    ) -> None:
        self.debug = debug
        self.memory_settings = memory_settings or {}
        self.folder = folder
        self.env = env
        self.log_path = folder.logs / f"rank-{env.rank:05d}.log"
        self.watchdog = Watchdog(watchdog, self.record_hang)
        self.code = 0
        """Exit code of a rank that ends without an error."""
        self._token = ""
        self._is_fenced: Callable[[], bool] = lambda: False
        self._report: _ErrorReport | None = None
        self._printed = False
        self._write_failure = ""
        """Error of writing the outcome; empty if it could be written."""

    def __enter__(self) -> RankSession:
        try:
            self._open_log()
        except USER_ERRORS as error:
            # Without the log folder the ranks cannot agree on who reports the error: one rank a node does.
            if self.env.local_rank == 0 or str(self.log_path) in str(error):
                print_error(error, f"rank {self.env.rank}: " if self.env.world > 1 else "")
            if self.debug:
                raise
            raise SystemExit(2) from None
        # The descriptor, not sys.stderr: libraries in C write to it too.
        with suppress(OSError):
            sys.stderr.flush()
        self._console, self._stderr = os.dup(2), sys.stderr
        try:
            os.dup2(self.log.fileno(), 2)
            sys.stderr = cast(TextIO, LossyStream(sys.stderr))
            # NCCL writes to stdout otherwise, which is the console of all ranks. A % is one of its patterns.
            logs = str(self.folder.logs).replace("%", "%%")
            os.environ.setdefault("NCCL_DEBUG_FILE", f"{logs}/nccl-{self.env.rank:05d}.%h.%p.log")
            faulthandler.enable(self.log)
            self.watchdog.start(self.log)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open_log(self) -> None:
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        if self.env.rank == 0 and not is_managed_by_job(self.folder):
            outcome_path(self.folder).unlink(missing_ok=True)
        self.log = self.log_path.open("a", buffering=1, errors="backslashreplace")
        try:
            with name_errors(self.log_path):
                self.log.write(
                    f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {host()}, process {os.getpid()}\n"
                )
        except OSError:
            with suppress(OSError):
                self.log.close()
            raise

    def set_fencing_token(self, token: str, is_fenced: Callable[[], bool]) -> None:
        """Set the token that this restart got with the run folder. All ranks call it, rank 0 first.

        Args:
            token: fencing token of this restart.
            is_fenced: returns True once another restart has acquired the folder; this one then no longer
                writes outcome.json.
        """
        self._token, self._is_fenced = token, is_fenced
        if self.env.rank == 0:
            # An earlier restart that was still running may have recorded its own outcome.
            outcome_path(self.folder).unlink(missing_ok=True)

    def is_managed_by_job(self) -> bool:
        """True if tools/job.py waits for the outcome, and can restart the run on other nodes."""
        return is_managed_by_job(self.folder)

    def record_end(
        self,
        finished: bool,
        interrupted: bool = False,
        by_keyboard: bool = False,
        bad_nodes: Mapping[str, str] | None = None,
    ) -> None:
        """Record the end of a run without an error. All ranks call it; the arguments of rank 0 count.

        Args:
            finished: the last step was reached.
            interrupted: a person asked to stop, at the terminal or with W&B's stop button.
            by_keyboard: Ctrl-C asked to stop; the exit code is 130.
            bad_nodes: host -> what it computed wrongly, if the ranks have stopped for that reason.
        """
        if self.env.rank == 0:
            if not finished and by_keyboard:
                self.code = 130
            if finished or interrupted:
                self._record(FINISHED if finished else INTERRUPTED, "")
            elif bad_nodes:
                message = "; ".join(f"{node} {why}" for node, why in bad_nodes.items())
                self._record(BAD_NODES, message, bad_nodes)
            else:
                self._record(PREEMPTED, "")
            if self._write_failure:
                self._print(f"warning: the outcome of the run is not recorded: {self._write_failure}")

    def record_hang(self, sentence: str) -> None:
        """Record, in the watchdog's thread, that this rank is about to be ended."""
        if self._record(FAILED, sentence):
            self._print(f"error: rank {self.env.rank}: {sentence}; stacks are in {self.log_path}")

    def _print(self, line: str) -> None:
        with suppress(OSError):
            os.write(self._console, f"{redact(line)}\n".encode())

    @contextmanager
    def record_outcome(self) -> Iterator[None]:
        """Record and print the outcome of an error inside this context at once: closing the outer contexts
        may take so long that Slurm ends the process first."""
        try:
            yield
        except BaseException as error:
            self._report = self._report or self._report_error(error)
            # A progress bar on a terminal would overwrite the line.
            if not sys.stdout.isatty():
                self._print_report()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.stop()
        faulthandler.disable()
        # The console first: it needs no disk.
        if error is not None and not isinstance(error, SystemExit):
            self._report = self._report or self._report_error(error)
            self._print_report()
        with suppress(OSError):
            sys.stderr.flush()
        sys.stderr = self._stderr
        os.dup2(self._console, 2)
        os.close(self._console)
        with suppress(OSError):
            if error is not None:
                self.log.write(redact("".join(traceback.format_exception(error))))
        with suppress(OSError):
            self.log.close()
        if error is None and self.code:
            raise SystemExit(self.code)
        if error is None or self._report is None:
            return
        if leaves_alone(error, self.env):
            if self.debug:
                sys.excepthook(type(error), error, trace)
            leave(self._report.code)
        if not self.debug:
            raise SystemExit(self._report.code) from None

    def _print_report(self) -> None:
        """Print the error on the console, unless another rank prints it or it has been printed."""
        if self._report is None or self._report.sentence is None or self._printed:
            return
        self._printed = True
        with suppress(OSError):
            sys.stderr.flush()
        redirected, sys.stderr = sys.stderr, self._stderr
        os.dup2(self._console, 2)
        print_error(self._report.sentence, self._report.prefix)
        os.dup2(self.log.fileno(), 2)
        sys.stderr = redirected

    def _report_error(self, error: BaseException) -> _ErrorReport:
        """Decide the exit code and the sentence for an error, and record the outcome if no rank has yet."""
        if self.watchdog.num_steps == 0:
            # The same command would run out of memory again.
            error = explain_out_of_memory(error, self.env.device, self.memory_settings) or error
        if is_peer_failure(error) and not is_out_of_memory(error):
            return _ErrorReport(EXIT_PEER_FAILED)
        if isinstance(error, KeyboardInterrupt):
            self._record(INTERRUPTED, "")
            return _ErrorReport(130)
        is_user_error = isinstance(error, USER_ERRORS)
        sentence = str(error) if is_user_error else f"{type(error).__name__}: {error}"
        names_no_file = isinstance(error, OSError) and error.errno is not None and error.filename is None
        if not is_user_error or names_no_file:
            sentence += f"; its log is {self.log_path}"
        code = 2 if is_user_error else 1
        if not self._record(REFUSED if is_user_error and not is_retryable(error) else FAILED, sentence):
            return _ErrorReport(code)
        # All ranks raise a shared error, so the line names no rank.
        is_shared = isinstance(error, SharedError)
        if self._write_failure and is_shared and self.env.rank != 0:
            return _ErrorReport(code)
        names_rank = self.env.world > 1 and not is_shared
        return _ErrorReport(code, sentence, f"rank {self.env.rank}: " if names_rank else "")

    def _record(self, kind: str, message: str, nodes: Mapping[str, str] | None = None) -> bool:
        """Record the outcome. Return True if this rank has to print it, because it is the first to record one
        or because the disk fails."""
        outcome = JobOutcome(kind, self.env.rank, message, restart_id(), dict(nodes or {}))
        try:
            return outcome.record(outcome_path(self.folder, self._token if self._is_fenced() else ""))
        except OSError as error:
            self._write_failure = str(error)
        return True
