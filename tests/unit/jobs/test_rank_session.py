"""How an attempt at a run ends, as a launcher reads it; and when a job has made attempts enough."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from svd_ds.jobs import outcome as outcome_module
from svd_ds.jobs.outcome import (
    BAD_NODES,
    FAILED,
    FINISHED,
    INTERRUPTED,
    PREEMPTED,
    REFUSED,
    JobOutcome,
)
from svd_ds.jobs.rank_session import RankSession, record_queued_restart
from svd_ds.jobs.watchdog import Watchdog, WatchdogConfig
from svd_ds.parallel.collectives import RetryableSharedError, SharedError
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder
from tests.networks import seal

OFF = WatchdogConfig(minutes=0)


def env(rank: int, world: int = 2) -> Env:
    return Env(rank, world, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")


def attempted(folder: Path, rank: int, error: BaseException | None = None, finished: bool = True) -> int:
    """One rank's attempt; its exit code."""
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(folder), env(rank), OFF) as attempt:
        if error is not None:
            raise error
        attempt.record_end(finished)
        sys.exit(0)
    return ended.value.code


def outcome(folder: Path) -> JobOutcome | None:
    return JobOutcome.read(RunFolder(folder))


@pytest.mark.parametrize(("finished", "kind"), [(True, FINISHED), (False, PREEMPTED)])
def test_rank_0_says_how_an_attempt_ended_well(tmp_path: Path, finished: bool, kind: str) -> None:
    assert attempted(tmp_path, 0, finished=finished) == 0
    assert attempted(tmp_path, 1, finished=finished) == 0
    assert outcome(tmp_path) == JobOutcome(kind, 0, "", (0, 0))


def test_a_run_that_is_stopped_for_good_says_so(tmp_path: Path) -> None:
    for finished, kind in ((False, INTERRUPTED), (True, FINISHED)):
        with RankSession(RunFolder(tmp_path), env(0), OFF) as attempt:
            attempt.record_end(finished, interrupted=True)
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
def test_an_error_becomes_an_outcome_a_code_and_one_line(
    tmp_path: Path, error: BaseException, code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempted(tmp_path, 0, error) == code
    told = outcome(tmp_path)
    assert told is not None and told.kind == kind
    assert len(capsys.readouterr().err.splitlines()) == (0 if kind == INTERRUPTED else 1)
    assert "Traceback" in (tmp_path / "logs/rank-00000.log").read_text()


def test_an_outcome_does_not_wait_for_what_is_left_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B may take a minute to leave; by then Slurm may have ended a rank of which another has gone."""
    with (
        pytest.raises(SystemExit),
        RankSession(RunFolder(tmp_path), env(0), OFF) as attempt,
        ExitStack() as stack,
    ):
        stack.callback(lambda: left.append(outcome(tmp_path)))
        left: list[JobOutcome | None] = []
        with attempt.record_outcome():
            raise SharedError("data.path is nowhere")
    assert left == [JobOutcome(REFUSED, 0, "data.path is nowhere", (0, 0))]
    assert capsys.readouterr().err.splitlines() == ["error: data.path is nowhere"]


def test_the_first_rank_to_fail_tells_it_and_names_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempted(tmp_path, 3, KeyError("first")) == 1
    assert attempted(tmp_path, 2, KeyError("second")) == 1
    assert attempted(tmp_path, 1, RuntimeError("[gloo/transport/pair.cc] Connection closed by peer")) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert "rank 3: KeyError: 'first'" in told[0] and "rank-00003.log" in told[0]
    assert "second" in (tmp_path / "logs/rank-00002.log").read_text()
    assert "closed by peer" in (tmp_path / "logs/rank-00001.log").read_text()


def test_what_libraries_write_to_stderr_is_in_the_log_of_every_attempt(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for word in ("one", "two"):
        with RankSession(RunFolder(tmp_path), env(0), OFF):
            os.write(2, f"{word} from C\n".encode())
    os.write(2, b"behind it\n")
    log = (tmp_path / "logs/rank-00000.log").read_text()
    assert "one from C" in log and "two from C" in log
    assert capfd.readouterr().err == "behind it\n"


def test_a_job_that_gets_no_further_is_not_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(3):
        record_queued_restart(folder, "7", limit=3)
    with pytest.raises(ValueError, match=r"job 7 .* 3 times from step 0"):
        record_queued_restart(folder, "7", limit=3)
    record_queued_restart(folder, "8", limit=3)  # someone has submitted it anew
    for name, marker in (("step-0000020", True), ("step-0000040", False)):
        (folder.checkpoints / name).mkdir(parents=True)
        if marker:
            seal(folder.checkpoints / name)
    record_queued_restart(folder, "7", limit=3)
    attempts = [json.loads(line) for line in (tmp_path / "logs/attempts.jsonl").read_text().splitlines()]
    assert [attempt["step"] for attempt in attempts] == [0, 0, 0, 0, 20], (
        "a checkpoint without its marker does not count"
    )


def test_a_line_that_was_cut_short_costs_no_more_than_itself(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/attempts.jsonl"
    record_queued_restart(folder, "7", limit=3)
    path.write_text(path.read_text() + '{"job": "7", "st')
    record_queued_restart(folder, "7", limit=3)
    assert [json.loads(line)["job"] for line in path.read_text().splitlines()] == ["7", "7"]


def test_nccl_writes_to_a_file_of_its_rank_unless_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "")  # so that it is put back
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    for folder in ("first", "second"):
        attempted(tmp_path / folder, 3)
        assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/first/logs/nccl-00003.%h.%p.log"


def test_a_new_attempt_forgets_how_the_last_ended(tmp_path: Path) -> None:
    attempted(tmp_path, 0)
    record_queued_restart(RunFolder(tmp_path), "7", limit=3)
    assert outcome(tmp_path) is None


def test_rank_0_does_not_forget_who_failed_before_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where one node of several has too few GPUs."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    record_queued_restart(RunFolder(tmp_path), "7", limit=3)
    for rank in (3, 0):
        assert attempted(tmp_path, rank, ValueError("4 ranks need a GPU each, and it has 2")) == 2
    told = outcome(tmp_path)
    assert told is not None and (told.kind, told.rank) == (REFUSED, 3)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_that_all_ranks_know_is_told_by_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun ends all as soon as one has ended: none can rely on another to say it."""
    for rank in (1, 2):
        assert attempted(tmp_path, rank, SharedError("data.path is nowhere")) == 2
    told = outcome(tmp_path)
    assert told is not None and (told.kind, told.rank) == (REFUSED, 1)
    assert capsys.readouterr().err.splitlines() == ["error: data.path is nowhere"]


def test_a_rank_of_an_earlier_attempt_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on, on a node that was cut off, until it finds that another has taken the run over."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fenced = SharedError("another start of this run has taken over")
    for restarts, error, kind in (("1", None, FINISHED), ("0", fenced, FINISHED), ("2", fenced, REFUSED)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        # Rank 0 of an attempt forgets what was told before it: these are others.
        with (
            pytest.raises(SystemExit),
            RankSession(RunFolder(tmp_path), env(0 if error is None else 1), OFF) as it,
        ):
            if error is not None:
                raise ValueError(str(error))
            it.record_end(finished=True)
            sys.exit(0)
        told = json.loads((tmp_path / "logs/outcome.json").read_text())
        assert told["kind"] == kind
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert outcome(tmp_path) is None, "this attempt has not ended"
    assert [path.name for path in (tmp_path / "logs").glob("*.tmp")] == []


# --- a disk that fails, and other places where nothing can be recorded


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
    with pytest.raises(SystemExit) as ended, RankSession(RunFolder(tmp_path), env(rank), OFF) as attempt:
        # From here on the log is on a disk that is full: its text layer keeps what it cannot write.
        os.dup2(os.open("/dev/full", os.O_WRONLY), attempt.log.fileno())
        with attempt.record_outcome():
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
        assert attempted(tmp_path, rank, RetryableSharedError("the checkpoint cannot be written")) == 2
    assert capsys.readouterr().err.splitlines() == ["error: the checkpoint cannot be written"]


def test_run_that_is_done_ends_well_though_its_outcome_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_to_record(monkeypatch, errno.ENOSPC)
    assert attempted(tmp_path, 0) == 0
    assert "warning: how the run ended is not recorded: [Errno 28]" in capfd.readouterr().err


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
    assert "No space left on device: '" in (told := capsys.readouterr().err) and "rank-00000.log" in told


@pytest.mark.parametrize("error", [OverflowError("timestamp too large"), OSError("no thread")])
def test_start_that_fails_after_the_console_was_taken_gives_it_back(
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
    assert attempted(tmp_path, 1, KeyError("first")) == 1
    assert attempted(tmp_path, 2, KeyError("second")) == 1
    told = outcome(tmp_path)
    assert told is not None and (told.kind, told.rank) == (FAILED, 1)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert attempted(tmp_path, 0) == 0, "rank 0 begins another attempt"
    assert outcome(tmp_path) == JobOutcome(FINISHED, 0, "", (0, 0))
    assert sorted(path.suffix for path in (tmp_path / "logs").iterdir()) == [".json", ".log", ".log", ".log"]


def test_outcome_names_nodes_that_compute_wrongly_unless_the_run_needs_no_other_attempt(
    tmp_path: Path,
) -> None:
    bad = {"node2": "computed a loss of nan, then 0.5", "node3": "too"}
    for finished, interrupted, kind in (
        (False, False, BAD_NODES), (True, False, FINISHED), (False, True, INTERRUPTED)
    ):  # fmt: skip
        for rank in (0, 1):
            with RankSession(RunFolder(tmp_path), env(rank), OFF) as attempt:
                attempt.record_end(finished, interrupted, bad_nodes=bad)
        told = outcome(tmp_path)
        assert told is not None and told.kind == kind
        assert told.nodes == (bad if kind == BAD_NODES else {})
        assert told.message == ("node2 computed a loss of nan, then 0.5; node3 too" if told.nodes else "")


@pytest.mark.parametrize("nodes", ["[1]", "7", '"node1"', "null"])
def test_outcome_with_damaged_nodes_is_none(tmp_path: Path, nodes: str) -> None:
    (tmp_path / "logs").mkdir()
    told = '{"kind": "bad nodes", "rank": 0, "message": "", "restart_id": [0, 0], "nodes": NODES}'
    (tmp_path / "logs/outcome.json").write_text(told.replace("NODES", nodes))
    assert outcome(tmp_path) is None
    (tmp_path / "logs/outcome.json").write_text(told.replace(', "nodes": NODES', ""))
    assert outcome(tmp_path) is not None, "as earlier versions wrote it"


def test_job_is_known_by_its_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RankSession(RunFolder(tmp_path), env(0), OFF) as attempt:
        assert not attempt.is_managed_by_job()
        record_queued_restart(RunFolder(tmp_path), "7", limit=3)
        assert not attempt.is_managed_by_job(), "another start's"
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert attempt.is_managed_by_job()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 40, b"{}", b"[1]", b'{"kind": "finished", "restart_id": 3}']
)
def test_damaged_outcome_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/outcome.json").write_bytes(content)
    assert outcome(tmp_path) is None


def test_damaged_attempts_are_kept_and_reported(tmp_path: Path) -> None:
    folder, path = RunFolder(tmp_path), tmp_path / "logs/attempts.jsonl"
    assert record_queued_restart(folder, "7", limit=3) is None
    path.write_bytes(b"\xff\n{}\n" + path.read_bytes())
    damage = record_queued_restart(folder, "7", limit=3)
    assert damage is not None and damage.endswith("attempts.jsonl.damaged-1")
    assert [json.loads(line)["job"] for line in path.read_text().splitlines()] == ["7", "7"]


def test_ctrl_c_ends_rank_0_with_130_after_its_checkpoint(tmp_path: Path) -> None:
    for rank, code in ((0, 130), (1, 0)):
        try:
            with RankSession(RunFolder(tmp_path), env(rank), OFF) as attempt:
                attempt.record_end(finished=False, interrupted=True, by_keyboard=True)
            ended = 0
        except SystemExit as error:
            ended = error.code
        assert ended == code
    told = outcome(tmp_path)
    assert told is not None and told.kind == INTERRUPTED


def test_patterns_in_the_folders_name_are_not_nccls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "")
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    attempted(tmp_path / "100%p", 0)
    assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/100%%p/logs/nccl-00000.%h.%p.log"


def test_start_that_lost_the_folder_leaves_the_outcome_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = SharedError("another start of this run has taken over")
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
    told = outcome(tmp_path)
    assert told is not None and (told.kind, told.restart_id) == (FINISHED, (7, 0))
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    told = outcome(tmp_path)
    assert told is not None and (told.kind, told.restart_id) == (REFUSED, (9, 0)), (
        "its job is not queued again"
    )


def test_start_that_takes_the_folder_over_forgets_what_an_earlier_one_said_meanwhile(tmp_path: Path) -> None:
    with RankSession(RunFolder(tmp_path), env(0), OFF) as later:
        attempted(tmp_path, 1, OSError("no space left"))
        later.set_fencing_token("token", lambda: False)
        later.record_end(finished=True)
    told = outcome(tmp_path)
    assert told is not None and told.kind == FINISHED
