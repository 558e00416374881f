"""One attempt at a run: a start of all its ranks, a log of each, and how it ended.

    logs/rank-00003.log   what rank 3 wrote to stderr, in all attempts: warnings, tracebacks, a hang's stacks
    logs/nccl-00003.*.log what its NCCL had to say: by host and process, for it begins a file anew
    logs/outcome.json     how the newest attempt ended (svd_ds.jobs.outcome)
    logs/attempts.jsonl   the attempts that jobs made, each with the step behind which it began

The launcher reads the outcome, to know whether another attempt is worth making.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from svd_ds.cli import EXIT_PEER_FAILED, USER_ERRORS, LossyStream, is_retryable, print_error
from svd_ds.credentials import redact
from svd_ds.fsync_io import name_errors, replace_text
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
from svd_ds.jobs.watchdog import Watchdog, WatchdogConfig
from svd_ds.json_lines import read_json_lines, rewrite_json_lines
from svd_ds.parallel.collectives import SharedError, is_peer_failure
from svd_ds.parallel.env import Env, host, restart_id
from svd_ds.run_folder import RunFolder
from svd_ds.weights.restarts import complete_checkpoints


@dataclass(frozen=True)
class _Verdict:
    """What becomes of an error."""

    code: int
    """The process's."""
    sentence: str | None = None
    """For the console; None where another rank tells."""
    who: str = ""


class RankSession:
    """A context around everything that a rank does: its stderr goes to the rank's log, and an error becomes
    an outcome, one line on the console, and an exit code.

    The first rank to claim the outcome tells its error: one line however many ranks fail. With `debug` an
    error also goes on, for its traceback to be seen.

    The log and the outcome are written as far as the disk allows: the console gets the sentence in any case.
    """

    def __init__(self, folder: RunFolder, env: Env, watchdog: WatchdogConfig, debug: bool = False) -> None:
        self.debug = debug
        self.folder = folder
        self.env = env
        self.log_path = folder.logs / f"rank-{env.rank:05d}.log"
        self.watchdog = Watchdog(watchdog, self.record_hang)
        self.code = 0
        """Exit code of a rank that ends well."""
        self._token = ""
        self._is_taken_over: Callable[[], bool] = lambda: False
        self._verdict: _Verdict | None = None
        self._unrecorded = ""
        """Why the outcome cannot be written, where it cannot."""

    def __enter__(self) -> RankSession:
        try:
            self._open_log()
        except USER_ERRORS as error:
            # There is no file yet by which the ranks could agree on who reports it: one of each node does.
            if self.env.local_rank == 0 or str(self.log_path) in str(error):
                print_error(error, f"rank {self.env.rank}: " if self.env.world > 1 else "")
            if self.debug:
                raise
            raise SystemExit(2) from None
        # The descriptor, not sys.stderr: what libraries write belongs here too.
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
        if self.env.rank == 0 and not _is_managed_by_job(self.folder):
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
        """This start of the run has taken the folder over; all ranks call it, rank 0 first.

        Args:
            token: the start's fencing token.
            is_fenced: whether another start has done the same since. From then on this start must not
                write outcome.json.
        """
        self._token, self._is_taken_over = token, is_fenced
        if self.env.rank == 0:
            # An earlier start that was still alive may have said how it ended.
            outcome_path(self.folder).unlink(missing_ok=True)

    def is_managed_by_job(self) -> bool:
        """Whether tools/job.py waits for the outcome: it can make another attempt, and on other nodes."""
        return _is_managed_by_job(self.folder)

    def record_end(
        self,
        finished: bool,
        interrupted: bool = False,
        by_keyboard: bool = False,
        bad_nodes: Mapping[str, str] | None = None,
    ) -> None:
        """All ranks did what they were asked; called by each. What rank 0 says counts: it knows of W&B's stop
        button, and its exit code is 130 after Ctrl-C.

        Args:
            bad_nodes: hosts that compute wrongly, and what, where that is why the ranks have stopped.
        """
        if self.env.rank == 0:
            if not finished and by_keyboard:
                self.code = 130
            if finished or interrupted:
                self._claim(FINISHED if finished else INTERRUPTED, "")
            elif bad_nodes:
                told = "; ".join(f"{node} {why}" for node, why in bad_nodes.items())
                self._claim(BAD_NODES, told, bad_nodes)
            else:
                self._claim(PREEMPTED, "")
            if self._unrecorded:
                self._print(f"warning: how the run ended is not recorded: {self._unrecorded}")

    def record_hang(self, sentence: str) -> None:
        """Tell, from the watchdog's thread, that this rank is about to be ended."""
        if self._claim(FAILED, sentence):
            self._print(f"error: rank {self.env.rank}: {sentence}; stacks are in {self.log_path}")

    def _print(self, line: str) -> None:
        with suppress(OSError):
            os.write(self._console, f"{redact(line)}\n".encode())

    @contextmanager
    def record_outcome(self) -> Iterator[None]:
        """Inside, an error is judged at once: what is closed on the way out of the attempt may take so long
        that Slurm ends it before it has said anything."""
        try:
            yield
        except BaseException as error:
            self._verdict = self._judge(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.stop()
        faulthandler.disable()
        # The console first: it needs no disk.
        with suppress(OSError):
            sys.stderr.flush()
        sys.stderr = self._stderr
        os.dup2(self._console, 2)
        os.close(self._console)
        verdict = None
        if error is not None and not isinstance(error, SystemExit):
            verdict = self._verdict or self._judge(error)
            if verdict.sentence is not None:
                print_error(verdict.sentence, verdict.who)
        with suppress(OSError):
            if error is not None:
                self.log.write(redact("".join(traceback.format_exception(error))))
        with suppress(OSError):
            self.log.close()
        if verdict is not None and not self.debug:
            raise SystemExit(verdict.code) from None
        if error is None and self.code:
            raise SystemExit(self.code)

    def _judge(self, error: BaseException) -> _Verdict:
        """Claim the outcome, where that falls to this rank."""
        if is_peer_failure(error):
            return _Verdict(EXIT_PEER_FAILED)
        if isinstance(error, KeyboardInterrupt):
            self._claim(INTERRUPTED, "")
            return _Verdict(130)
        user = isinstance(error, USER_ERRORS)
        sentence = str(error) if user else f"{type(error).__name__}: {error}"
        if not user or (isinstance(error, OSError) and error.errno is not None and error.filename is None):
            sentence += f"; its log is {self.log_path}"
        code, kind = 2 if user else 1, REFUSED if user and not is_retryable(error) else FAILED
        if not self._claim(kind, sentence):
            return _Verdict(code)
        # What all know is not this rank's.
        shared = isinstance(error, SharedError)
        if self._unrecorded and shared and self.env.rank != 0:
            return _Verdict(code)
        return _Verdict(
            code, sentence, f"rank {self.env.rank}: " if self.env.world > 1 and not shared else ""
        )

    def _claim(self, kind: str, words: str, nodes: Mapping[str, str] | None = None) -> bool:
        """Whether it falls to this rank to report how the attempt ended: it is the first to record it, or it
        cannot, because the disk fails."""
        outcome = JobOutcome(kind, self.env.rank, words, restart_id(), dict(nodes or {}))
        try:
            return outcome.record(outcome_path(self.folder, self._token if self._is_taken_over() else ""))
        except OSError as error:
            self._unrecorded = str(error)
        return True


def record_queued_restart(folder: RunFolder, job: str, limit: int) -> str | None:
    """Note that `job` attempts the run once more.

    Returns:
        A sentence about a damaged attempts.jsonl, of which a copy is kept; None where it is whole.

    Raises:
        ValueError: the job's last `limit` attempts all began where this one would.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    path = _attempts(folder)
    found = rewrite_json_lines(path, lambda row: True, _is_attempt)
    step = max(complete_checkpoints(folder.checkpoints), default=0)
    recent = [row["step"] for row in found.rows if row["job"] == job][-limit:]
    if recent == [step] * limit:
        raise ValueError(
            f"job {job} has started {folder.path} {limit} times from step {step} and never reached another "
            f"checkpoint; {folder.logs} says why"
        )
    rows = [*found.rows, {"job": job, "step": step, "time": time.time()}]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    outcome_path(folder).unlink(missing_ok=True)
    return found.damage


def _is_managed_by_job(folder: RunFolder) -> bool:
    """Whether `record_queued_restart` was called for this attempt: before any rank of it could speak, it forgot the last."""
    rows = read_json_lines(_attempts(folder), _is_attempt, skip_bad=True).rows
    return bool(rows) and rows[-1]["job"] == str(restart_id()[0])


def _attempts(folder: RunFolder) -> Path:
    return folder.logs / "attempts.jsonl"


def _is_attempt(row: dict[str, Any]) -> bool:
    return isinstance(row.get("job"), str) and isinstance(row.get("step"), int)
