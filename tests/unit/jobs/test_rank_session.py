"""End of a rank: its outcome as a launcher reads it, its exit code, and its line on the console."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from svd_ds.jobs import outcome as outcome_module
from svd_ds.jobs import rank_session
from svd_ds.jobs.outcome import (
    BAD_NODES,
    FAILED,
    FINISHED,
    INTERRUPTED,
    PREEMPTED,
    REFUSED,
    JobOutcome,
)
from svd_ds.jobs.rank_session import RankSession
from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.jobs.watchdog import Watchdog, WatchdogConfig
from svd_ds.parallel.collectives import RetryableSharedError, SharedError
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder

OFF = WatchdogConfig(minutes=0)


class LeftAloneError(SystemExit):
    """Stands for the end of the process of a rank that fails alone."""


@pytest.fixture(autouse=True)
def _leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise LeftAloneError(code)

    monkeypatch.setattr(rank_session, "leave", leave)


def env(rank: int, world: int = 2) -> Env:
    return Env(rank, world, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")


def run_rank(folder: Path, rank: int, error: BaseException | None = None, finished: bool = True) -> int:
    """Run the session of one rank; return its exit code."""
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(folder), env(rank), OFF) as session:
        if error is not None:
            raise error
        session.record_end(finished)
        sys.exit(0)
    return ended.value.code


def outcome(folder: Path) -> JobOutcome | None:
    return JobOutcome.read(RunFolder(folder))


@pytest.mark.parametrize(("finished", "kind"), [(True, FINISHED), (False, PREEMPTED)])
def test_rank_0_records_how_a_run_ended_without_an_error(tmp_path: Path, finished: bool, kind: str) -> None:
    assert run_rank(tmp_path, 0, finished=finished) == 0
    assert run_rank(tmp_path, 1, finished=finished) == 0
    assert outcome(tmp_path) == JobOutcome(kind, 0, "", (0, 0))


def test_run_that_a_person_stopped_is_recorded_as_interrupted(tmp_path: Path) -> None:
    for finished, kind in ((False, INTERRUPTED), (True, FINISHED)):
        with RankSession(RunFolder(tmp_path), env(0), OFF) as session:
            session.record_end(finished, interrupted=True)
        ended = outcome(tmp_path)
        assert ended is not None and ended.kind == kind


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (SharedError("data.path is nowhere"), 2, REFUSED),
        (ValueError("clip 7 cannot be read"), 2, REFUSED),
        (OSError("no space left"), 2, FAILED),
        (RetryableSharedError("no space left"), 2, FAILED),
        (FileNotFoundError("data.path is nowhere"), 2, REFUSED),
        (KeyError("bug"), 1, FAILED),
        (KeyboardInterrupt(), 130, INTERRUPTED),
    ],
)
def test_error_becomes_an_outcome_a_code_and_one_line(
    tmp_path: Path, error: BaseException, code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rank(tmp_path, 0, error) == code
    recorded = outcome(tmp_path)
    assert recorded is not None and recorded.kind == kind
    assert len(capsys.readouterr().err.splitlines()) == (0 if kind == INTERRUPTED else 1)
    assert "Traceback" in (tmp_path / "logs/rank-00000.log").read_text()


def test_outcome_is_recorded_and_printed_before_the_contexts_around_are_closed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B may take a minute to close; by then Slurm may have ended this rank, because another has ended."""
    with (
        pytest.raises(SystemExit),
        RankSession(RunFolder(tmp_path), env(0), OFF) as session,
        session.record_outcome(),
        ExitStack() as stack,
    ):
        stack.callback(lambda: left.append((outcome(tmp_path), capsys.readouterr().err)))
        left: list[tuple[JobOutcome | None, str]] = []
        with session.record_outcome():
            raise SharedError("data.path is nowhere")
    recorded = JobOutcome(REFUSED, 0, "data.path is nowhere", (0, 0))
    assert left == [(recorded, "error: data.path is nowhere\n")]
    assert capsys.readouterr().err == "", "printed once"


@pytest.mark.parametrize(
    ("error", "world", "alone"),
    [
        (KeyError("bug"), 2, True),
        (ValueError("clip 7 cannot be read"), 2, True),
        (RuntimeError("[gloo/transport/pair.cc] Connection closed by peer"), 2, True),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, True),
        (KeyboardInterrupt(), 2, True),
        (SharedError("data.path is nowhere"), 2, False),
        (RetryableSharedError("no space left"), 2, False),
        (KeyError("bug"), 1, False),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_rank_that_fails_alone_ends_its_process_after_it_has_reported(
    tmp_path: Path,
    error: BaseException,
    world: int,
    alone: bool,
    debug: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (
        pytest.raises(BaseException) as ended,
        RankSession(RunFolder(tmp_path), env(0, world), OFF, debug),
    ):
        raise error
    assert isinstance(ended.value, LeftAloneError) == alone
    assert (ended.value is error) == (debug and not alone), "it reaches the caller, who shows its traceback"
    assert ("Traceback" in capsys.readouterr().err) == (debug and alone)
    assert "Traceback" in (tmp_path / "logs/rank-00000.log").read_text()
    assert (outcome(tmp_path) is None) == ("gloo" in str(error)), "the rank that failed first reports why"


def test_memory_that_runs_out_is_a_mistake_only_before_the_first_step_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB."
    for num_steps, code, kind, part in ((0, 2, REFUSED, "batch.micro=1 (now 4)"), (1, 1, FAILED, message)):
        folder = tmp_path / kind
        with (
            pytest.raises(SystemExit) as ended,
            RankSession(RunFolder(folder), env(0), OFF, memory_settings={"batch.micro": 4}) as session,
        ):
            for _ in range(num_steps):
                session.watchdog.heartbeat()
            raise torch.OutOfMemoryError(message)
        recorded = outcome(folder)
        assert recorded is not None and (recorded.kind, ended.value.code) == (kind, code)
        assert part in recorded.message and part in capsys.readouterr().err


def test_nccl_out_of_memory_is_no_failure_of_a_peer(tmp_path: Path) -> None:
    message = "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
    with (
        pytest.raises(SystemExit) as ended,
        RankSession(RunFolder(tmp_path), env(0), OFF) as session,
    ):
        session.watchdog.heartbeat()
        raise dist.DistBackendError(message)
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, ended.value.code) == (FAILED, 1)


def test_first_rank_to_fail_prints_its_error_and_names_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_rank(tmp_path, 3, KeyError("first")) == 1
    assert run_rank(tmp_path, 2, KeyError("second")) == 1
    assert run_rank(tmp_path, 1, RuntimeError("[gloo/transport/pair.cc] Connection closed by peer")) == 1
    recorded = capsys.readouterr().err.splitlines()
    assert len(recorded) == 1, recorded
    assert "rank 3: KeyError: 'first'" in recorded[0] and "rank-00003.log" in recorded[0]
    assert "second" in (tmp_path / "logs/rank-00002.log").read_text()
    assert "closed by peer" in (tmp_path / "logs/rank-00001.log").read_text()


def test_stderr_of_libraries_is_in_the_log_of_every_restart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for word in ("one", "two"):
        with RankSession(RunFolder(tmp_path), env(0), OFF):
            os.write(2, f"{word} from C\n".encode())
    os.write(2, b"after it\n")
    log = (tmp_path / "logs/rank-00000.log").read_text()
    assert "one from C" in log and "two from C" in log
    assert capfd.readouterr().err == "after it\n"


def test_nccl_writes_to_a_file_of_its_rank_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "")  # so that it is put back
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    for folder in ("first", "second"):
        run_rank(tmp_path / folder, 3)
        assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/first/logs/nccl-00003.%h.%p.log"


def test_queued_restart_discards_the_last_outcome(tmp_path: Path) -> None:
    run_rank(tmp_path, 0)
    record_queued_restart(RunFolder(tmp_path), 7, limit=3)
    assert outcome(tmp_path) is None


def test_rank_0_keeps_the_outcome_of_a_rank_that_failed_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank fails earlier where, for example, its node has too few GPUs."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record_queued_restart(RunFolder(tmp_path), 7, limit=3)
    for rank in (3, 0):
        assert run_rank(tmp_path, rank, ValueError("4 ranks need a GPU each, and it has 2")) == 2
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, recorded.rank) == (REFUSED, 3)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_shared_error_is_printed_by_the_first_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun ends all ranks as soon as one has ended: none can rely on another to print it."""
    for rank in (1, 2):
        assert run_rank(tmp_path, rank, SharedError("data.path is nowhere")) == 2
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, recorded.rank) == (REFUSED, 1)
    assert capsys.readouterr().err.splitlines() == ["error: data.path is nowhere"]


def test_rank_of_an_earlier_restart_records_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a rank, on a node that was cut off, runs until it finds that it is fenced."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fenced = SharedError("another restart of this run has taken over")
    for restarts, error, kind in (("1", None, FINISHED), ("0", fenced, FINISHED), ("2", fenced, REFUSED)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        # Rank 0 of a restart discards earlier outcomes: these are other ranks.
        with (
            pytest.raises(SystemExit),
            RankSession(RunFolder(tmp_path), env(0 if error is None else 1), OFF) as it,
        ):
            if error is not None:
                raise ValueError(str(error))
            it.record_end(finished=True)
            sys.exit(0)
        recorded = json.loads((tmp_path / "logs/outcome.json").read_text())
        assert recorded["kind"] == kind
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert outcome(tmp_path) is None, "this restart has not ended"
    assert [path.name for path in (tmp_path / "logs").glob("*.tmp")] == []


# --- a failing disk, and other cases in which nothing can be recorded


def fail_to_record(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(outcome_module, "create_text", fail)
    monkeypatch.setattr(outcome_module, "replace_text", fail)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("rank", [0, 1])
def test_failing_disk_still_gets_one_sentence_and_a_code(
    tmp_path: Path,
    code: int,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fail_to_record(monkeypatch, code)
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(tmp_path), env(rank), OFF) as session:
        # From here on the log is on a disk that is full: its text layer keeps what it cannot write.
        os.dup2(os.open("/dev/full", os.O_WRONLY), session.log.fileno())
        with session.record_outcome():
            print("a library's warning", file=sys.stderr)
            raise OSError(code, os.strerror(code), str(tmp_path / "metrics.jsonl"))
    assert ended.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: rank {rank}: [Errno {code}]") and "metrics.jsonl" in line
    os.write(2, b"the console is back\n")
    assert capfd.readouterr().err == "the console is back\n"


def test_shared_error_that_cannot_be_recorded_is_printed_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_to_record(monkeypatch, errno.EIO)
    for rank in (1, 0):
        assert run_rank(tmp_path, rank, RetryableSharedError("the checkpoint cannot be written")) == 2
    assert capsys.readouterr().err.splitlines() == ["error: the checkpoint cannot be written"]


def test_finished_run_exits_with_0_though_its_outcome_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_to_record(monkeypatch, errno.ENOSPC)
    assert run_rank(tmp_path, 0) == 0
    assert "warning: the outcome of the run is not recorded: [Errno 28]" in capfd.readouterr().err


@pytest.mark.parametrize("world", [1, 2])
def test_log_that_cannot_be_opened_is_one_sentence(
    tmp_path: Path, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(tmp_path), env(0, world), OFF):
        pass
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f"'{tmp_path}/logs'")


def test_log_on_a_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-00000.log").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(tmp_path), env(0), OFF):
        pass
    assert ended.value.code == 2
    assert "No space left on device: '" in (line := capsys.readouterr().err) and "rank-00000.log" in line


@pytest.mark.parametrize("error", [OverflowError("timestamp too large"), OSError("no thread")])
def test_session_that_fails_to_start_restores_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Watchdog, "start", fail)
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(tmp_path), env(0, 1), OFF):
        pass
    assert ended.value.code == (2 if isinstance(error, OSError) else 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(error) in line
    assert str(error) in (tmp_path / "logs/rank-00000.log").read_text()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_file_system_without_hard_links_records_the_first_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    assert run_rank(tmp_path, 1, KeyError("first")) == 1
    assert run_rank(tmp_path, 2, KeyError("second")) == 1
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, recorded.rank) == (FAILED, 1)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run_rank(tmp_path, 0) == 0, "rank 0 restarts the run"
    assert outcome(tmp_path) == JobOutcome(FINISHED, 0, "", (0, 0))
    assert sorted(path.suffix for path in (tmp_path / "logs").iterdir()) == [".json", ".log", ".log", ".log"]


def test_outcome_names_nodes_that_compute_wrongly_unless_the_run_needs_no_restart(
    tmp_path: Path,
) -> None:
    bad = {"node2": "computed a loss of nan, then 0.5", "node3": "too"}
    for finished, interrupted, kind in (
        (False, False, BAD_NODES), (True, False, FINISHED), (False, True, INTERRUPTED)
    ):  # fmt: skip
        for rank in (0, 1):
            with RankSession(RunFolder(tmp_path), env(rank), OFF) as session:
                session.record_end(finished, interrupted, bad_nodes=bad)
        recorded = outcome(tmp_path)
        assert recorded is not None and recorded.kind == kind
        assert recorded.nodes == (bad if kind == BAD_NODES else {})
        assert recorded.message == (
            "node2 computed a loss of nan, then 0.5; node3 too" if recorded.nodes else ""
        )


@pytest.mark.parametrize("nodes", ["[1]", "7", '"node1"', "null"])
def test_outcome_with_damaged_nodes_is_none(tmp_path: Path, nodes: str) -> None:
    (tmp_path / "logs").mkdir()
    recorded = '{"kind": "bad nodes", "rank": 0, "message": "", "restart_id": [0, 0], "nodes": NODES}'
    (tmp_path / "logs/outcome.json").write_text(recorded.replace("NODES", nodes))
    assert outcome(tmp_path) is None
    (tmp_path / "logs/outcome.json").write_text(recorded.replace(', "nodes": NODES', ""))
    assert outcome(tmp_path) is not None, "as earlier versions wrote it"


def test_job_is_known_by_its_queued_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RankSession(RunFolder(tmp_path), env(0), OFF) as session:
        assert not session.is_managed_by_job()
        record_queued_restart(RunFolder(tmp_path), 7, limit=3)
        assert not session.is_managed_by_job(), "recorded by another job"
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert session.is_managed_by_job()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 40, b"{}", b"[1]", b'{"kind": "finished", "restart_id": 3}']
)
def test_damaged_outcome_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/outcome.json").write_bytes(content)
    assert outcome(tmp_path) is None


def test_ctrl_c_ends_rank_0_with_130_after_its_checkpoint(tmp_path: Path) -> None:
    for rank, code in ((0, 130), (1, 0)):
        try:
            with RankSession(RunFolder(tmp_path), env(rank), OFF) as session:
                session.record_end(finished=False, interrupted=True, by_keyboard=True)
            ended = 0
        except SystemExit as error:
            ended = error.code
        assert ended == code
    recorded = outcome(tmp_path)
    assert recorded is not None and recorded.kind == INTERRUPTED


def test_percent_sign_in_the_folder_is_no_pattern_of_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "")
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    run_rank(tmp_path / "100%p", 0)
    assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/100%%p/logs/nccl-00000.%h.%p.log"


def test_fenced_restart_leaves_the_outcome_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = SharedError("another restart of this run has taken over")
    for job, error, owner in (("9", lost, False), ("7", None, True)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        for rank in range(2 if error else 1):
            with pytest.raises(SystemExit), RankSession(RunFolder(tmp_path), env(rank), OFF) as it:
                it.set_fencing_token(f"token{job}", lambda owner=owner: not owner)  # type: ignore[misc]
                if error is not None:
                    raise error
                it.record_end(finished=True)
                sys.exit(0)
    assert capsys.readouterr().err.splitlines() == [f"error: {lost}"], "one sentence for all its ranks"
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, recorded.restart_id) == (FINISHED, (7, 0))
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    recorded = outcome(tmp_path)
    assert recorded is not None and (recorded.kind, recorded.restart_id) == (REFUSED, (9, 0)), (
        "its job is not requeued"
    )


def test_restart_that_acquires_the_folder_discards_the_outcome_of_an_earlier_one(tmp_path: Path) -> None:
    with RankSession(RunFolder(tmp_path), env(0), OFF) as later:
        run_rank(tmp_path, 1, OSError("no space left"))
        later.set_fencing_token("token", lambda: False)
        later.record_end(finished=True)
    recorded = outcome(tmp_path)
    assert recorded is not None and recorded.kind == FINISHED
