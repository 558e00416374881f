"""One attempt at a run: a start of all its ranks, a log of each, and how it ended.

    logs/rank-00003.log   what rank 3 wrote to stderr, in all attempts: warnings, tracebacks, a hang's stacks
    logs/nccl-00003.*.log what its NCCL had to say: by host and process, for it begins a file anew
    logs/outcome.json     how the newest attempt ended; missing where it was killed
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from svd_ds.door import OF_ANOTHER, USER_ERRORS, may_pass, print_error
from svd_ds.fsync_io import replace_text, write_text
from svd_ds.model.lives import complete_checkpoints
from svd_ds.parallel.collectives import SharedError, lost_a_rank
from svd_ds.parallel.env import Env, attempt, host
from svd_ds.training.folder import RunFolder, whole_lines
from svd_ds.training.watchdog import Watchdog, WatchdogConfig

FINISHED = "finished"
PREEMPTED = "preempted"
"""Asked to stop, it left a checkpoint."""
REFUSED = "refused"
"""A user's mistake: another attempt would end the same."""
INTERRUPTED = "interrupted"
"""By a person at the terminal, or with W&B's stop button."""
FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    kind: str
    rank: int
    words: str
    attempt: tuple[int, int]
    """svd_ds.parallel.env.attempt: ranks of an earlier one, on a node that was cut off, may still speak."""

    @staticmethod
    def read(folder: RunFolder) -> Outcome | None:
        """Of this attempt, in which the caller takes part; None where nobody has said it yet."""
        told = _told(folder)
        return told if told is not None and told.attempt == attempt() else None


@dataclass(frozen=True)
class _Verdict:
    """What becomes of an error."""

    code: int
    """The process's."""
    sentence: str | None = None
    """For the console; None where another rank tells."""
    who: str = ""


class Attempt:
    """A context around everything that a rank does: its stderr goes to the rank's log, and an error becomes
    an outcome, one line on the console, and an exit code.

    The first rank to claim the outcome tells its error: one line however many ranks fail. With `debug` an
    error also goes on, for its traceback to be seen.
    """

    def __init__(self, folder: RunFolder, env: Env, watchdog: WatchdogConfig, debug: bool = False) -> None:
        self.debug = debug
        self.folder = folder
        self.env = env
        self.log_path = folder.logs / f"rank-{env.rank:05d}.log"
        self.watchdog = Watchdog(watchdog, self.told_hang)
        self._verdict: _Verdict | None = None

    def __enter__(self) -> Attempt:
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        if self.env.rank == 0 and not _begun_by_a_job(self.folder):
            _outcome(self.folder).unlink(missing_ok=True)
        self.log = self.log_path.open("a", buffering=1)
        self.log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {host()}, process {os.getpid()}\n")
        # The descriptor, not sys.stderr: what libraries write belongs here too.
        sys.stderr.flush()
        self._console = os.dup(2)
        os.dup2(self.log.fileno(), 2)
        # NCCL writes to stdout otherwise, which is the console of all ranks.
        os.environ.setdefault("NCCL_DEBUG_FILE", f"{self.folder.logs}/nccl-{self.env.rank:05d}.%h.%p.log")
        faulthandler.enable(self.log)
        self.watchdog.start(self.log)
        return self

    def ended(self, finished: bool, interrupted: bool = False) -> None:
        """All ranks did what they were asked; called by each. What rank 0 says counts: it knows of W&B's stop
        button."""
        if self.env.rank == 0:
            self._claim(FINISHED if finished else INTERRUPTED if interrupted else PREEMPTED, "")

    def told_hang(self, sentence: str) -> None:
        """Tell, from the watchdog's thread, that this rank is about to be ended."""
        if self._claim(FAILED, sentence):
            line = f"error: rank {self.env.rank}: {sentence}; stacks are in {self.log_path}\n"
            os.write(self._console, line.encode())

    @contextmanager
    def outcome(self) -> Iterator[None]:
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
        if error is not None:
            traceback.print_exception(error, file=self.log)
        faulthandler.disable()
        sys.stderr.flush()
        os.dup2(self._console, 2)
        os.close(self._console)
        self.log.close()
        if error is None or isinstance(error, SystemExit):
            return
        verdict = self._verdict or self._judge(error)
        if verdict.sentence is not None:
            print_error(verdict.sentence, verdict.who)
        if not self.debug:
            raise SystemExit(verdict.code) from None

    def _judge(self, error: BaseException) -> _Verdict:
        """Claim the outcome, where that falls to this rank."""
        if lost_a_rank(error):
            return _Verdict(OF_ANOTHER)
        if isinstance(error, KeyboardInterrupt):
            self._claim(INTERRUPTED, "")
            return _Verdict(130)
        user = isinstance(error, USER_ERRORS)
        sentence = str(error) if user else f"{type(error).__name__}: {error}; its log is {self.log_path}"
        code, kind = 2 if user else 1, REFUSED if user and not may_pass(error) else FAILED
        if not self._claim(kind, sentence):
            return _Verdict(code)
        # What all know is not this rank's.
        own = self.env.world > 1 and not isinstance(error, SharedError)
        return _Verdict(code, sentence, f"rank {self.env.rank}: " if own else "")

    def _claim(self, kind: str, words: str) -> bool:
        """Whether this rank is the first to say how it ended."""
        outcome = Outcome(kind, self.env.rank, words, attempt())
        path = _outcome(self.folder)
        draft = path.with_name(f"{path.name}.{self.env.rank}.tmp")
        write_text(draft, json.dumps(asdict(outcome)) + "\n")
        try:
            # Unlike a rename, a link fails where there is a file.
            os.link(draft, path)
        except FileExistsError:
            told = _told(self.folder)
            if told is None or told.attempt >= outcome.attempt:
                return False
            os.replace(draft, path)
            return True
        finally:
            draft.unlink(missing_ok=True)
        return True


def begin(folder: RunFolder, job: str, limit: int) -> None:
    """Note that `job` attempts the run once more.

    Raises ValueError where its last `limit` attempts all began where this one would.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    path = folder.logs / "attempts.jsonl"
    lines = whole_lines(path)
    attempts = [json.loads(line) for line in lines]
    step = max(complete_checkpoints(folder.checkpoints), default=0)
    recent = [each["step"] for each in attempts if each["job"] == job][-limit:]
    if recent == [step] * limit:
        raise ValueError(
            f"job {job} has started {folder.path} {limit} times from step {step} and never reached another "
            f"checkpoint; {folder.logs} says why"
        )
    replace_text(path, "".join([*lines, json.dumps({"job": job, "step": step, "time": time.time()}) + "\n"]))
    _outcome(folder).unlink(missing_ok=True)


def _begun_by_a_job(folder: RunFolder) -> bool:
    """Whether `begin` was called for this attempt: before any rank of it could speak, it forgot the last."""
    lines = whole_lines(folder.logs / "attempts.jsonl")
    return bool(lines) and json.loads(lines[-1])["job"] == str(attempt()[0])


def _told(folder: RunFolder) -> Outcome | None:
    """By whichever attempt spoke last."""
    path = _outcome(folder)
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Outcome(**values | {"attempt": tuple(values["attempt"])})


def _outcome(folder: RunFolder) -> Path:
    return folder.logs / "outcome.json"
