"""tools/job.py: which ends of a run deserve another life. srun and scontrol are programs of the test."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "job.py"
SRUN = """#!/bin/sh
# Asked by {asked}, the job asks its ranks.
if [ -n '{asked}' ]; then
  trap 'asked=yes' USR1
  kill -{asked} $PPID
  while [ -z "$asked" ]; do sleep 0.1; done
fi
[ -z '{kind}' ] ||
  echo '{{"kind": "{kind}", "rank": 1, "message": "its words", "restart_id": [7, 0], "nodes": {bad}}}' \
    > {run}/logs/outcome.json
echo "$SVD_DS_STARTED" >> {run}.started
exit {code}
"""
WITHOUT_NODE1 = ["requeuehold 7", "update JobId=7 ExcNodeList=node1", "release 7"]
Ended = Callable[..., tuple[int, list[str], bool]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ended(
    tool: ModuleType,
    scontrol: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Ended]:
    """ended(kind, code): the tool's exit code, what it asked of scontrol, whether its trial goes on."""
    run, trial = tmp_path / "run", tmp_path / "trial"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}

    def end(
        kind: str,
        code: int,
        *arguments: str,
        state: str = "RUNNING",
        asked: str = "",
        nodes: str = "node1",
        bad: Sequence[str] = (),
        check: Callable[..., dict[str, str]] = lambda *_: {},
    ) -> tuple[int, list[str], bool]:
        log = scontrol(state)
        trial.touch()
        (tmp_path / "srun").write_text(
            SRUN.format(
                kind=kind, run=run, code=code, asked=asked, bad=json.dumps(dict.fromkeys(bad, "is ill"))
            )
        )
        (tmp_path / "srun").chmod(0o755)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setattr(tool, "failing_nodes", check)
        monkeypatch.setattr(tool, "CLOCKS", tmp_path / "clocks")
        options = ["--job", "7", "--nodes", nodes, "--trial", str(trial), "--"]
        monkeypatch.setattr(sys, "argv", ["job.py", *options, "debug=tiny", f"run.dir={run}", *arguments])
        number = 0
        try:
            tool.main()
        except SystemExit as exit:
            number = exit.code
        return number, log.read_text().splitlines(), trial.exists()

    yield end
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("kind", "code", "state", "expected"),
    [
        ("finished", 0, "RUNNING", (0, [], False)),
        ("refused", 143, "RUNNING", (2, [], False)),
        ("interrupted", 0, "RUNNING", (0, [], False)),  # the agent would count another code as a failure
        ("preempted", 0, "RUNNING", (0, ["requeue 7"], True)),
        ("failed", 143, "RUNNING", (0, ["requeue 7"], True)),
        ("", 143, "RUNNING", (0, ["requeue 7"], True)),
        ("finished", 143, "RUNNING", (0, ["requeue 7"], True)),  # a rank died behind the last word
        ("preempted", 0, "CANCELLED", (0, [], True)),
        ("failed", 143, "PREEMPTED", (143, [], True)),
    ],
)
def test_what_follows_the_end_of_a_life(
    ended: Ended, kind: str, code: int, state: str, expected: tuple[int, list[str], bool]
) -> None:
    assert ended(kind, code, state=state) == expected


def test_usr1_queues_the_job_again_and_term_ends_the_trial(ended: Ended) -> None:
    assert ended("preempted", 0, asked="USR1") == (0, ["requeue 7"], True)
    assert ended("preempted", 0, asked="TERM") == (0, [], False), "the agent stops it early"
    assert ended("preempted", 0, asked="TERM", state="CANCELLED") == (0, [], True), "Slurm ends the job"


def test_why_the_job_is_queued_again_is_told(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    ended("failed", 143)
    assert capsys.readouterr().out == "job 7 is queued again: rank 1 failed: its words\n"


def test_a_mistake_starts_nothing(ended: Ended, tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        ended("finished", 0, "optim.learning_rate=1")
    assert not (tmp_path / "trial").exists(), "the sweep's next trial may begin"


def test_lives_that_come_no_further_are_not_repeated(ended: Ended) -> None:
    for _ in range(3):
        assert ended("failed", 143)[1] == ["requeue 7"]
    with pytest.raises(ValueError, match="3 times from step 0"):
        ended("failed", 143)


@pytest.mark.parametrize(
    ("nodes", "faults", "asked"),
    [
        ("node1,node2", ["node1"], WITHOUT_NODE1),
        ("node1", ["node1"], WITHOUT_NODE1),
        ("node1,node2", ["node1", "node2"], ["requeue 7"]),  # it is hardly they
    ],
)
def test_a_job_leaves_a_node_that_fails(
    ended: Ended, nodes: str, faults: list[str], asked: list[str]
) -> None:
    for _ in range(3):
        found = ended("", 0, nodes=nodes, check=lambda *_: dict.fromkeys(faults, "is ill"))
        assert found == (0, asked, True)
    with pytest.raises(ValueError, match="3 times from step 0"):
        ended("", 0, nodes=nodes, check=lambda *_: dict.fromkeys(faults, "is ill"))


@pytest.mark.parametrize(
    ("nodes", "bad", "asked"),
    [
        ("node1,node2", ["node1"], WITHOUT_NODE1),
        ("node1", ["node1"], WITHOUT_NODE1),
        ("node1,node2", ["node1", "node2"], ["requeue 7"]),  # it is hardly they
        ("node1,node2", ["node1", "stranger"], WITHOUT_NODE1),
        ("node1,node2", ["stranger"], ["requeue 7"]),
    ],
)
def test_a_job_leaves_a_node_that_computed_wrongly(
    ended: Ended, nodes: str, bad: list[str], asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert ended("bad nodes", 0, nodes=nodes, bad=bad) == (0, asked, True)
    if asked == WITHOUT_NODE1:
        assert "job 7 is queued again without node1: node1 is ill" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 times from step 0"):
        ended("bad nodes", 0, nodes=nodes, bad=bad)


def test_checks_that_end_with_the_job_blame_no_node(ended: Ended) -> None:
    silent = {"node1": "does not answer"}

    def killed(*_: object) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return silent

    assert ended("", 0, check=lambda *_: silent, state="CANCELLED") == (0, [], True)
    assert ended("", 0, check=lambda *_: silent, state="PENDING") == (0, [], True), "queued from outside"
    assert ended("", 0, check=killed) == (0, ["requeue 7"], True)


def test_folder_named_after_the_time_is_one_in_all_restarts(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        (tmp_path / "run/logs").mkdir(parents=True, exist_ok=True)
        assert ended("", 143, folder)[1] == ["requeue 7"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(ValueError, match=f"{tmp_path}/runs/.* 3 times from step 0"):
        ended("", 143, folder)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "logs/restarts.jsonl").read_text().count("\n") == 3
    handed_on = (tmp_path / "run.started").read_text().split()
    assert len(handed_on) == 3 and len(set(handed_on)) == 1, "the ranks find the same folder"
    assert datetime.fromisoformat(handed_on[0]).strftime("%H-%M-%S-%f") == run.name
    assert not list((tmp_path / "clocks").iterdir()), "a job that has ended leaves nothing behind"


def test_job_number_that_is_given_again_gets_a_time_of_its_own(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    (tmp_path / "run/logs").mkdir(parents=True)
    for _ in range(2):
        ended("", 143, f"run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_signal_during_the_imports_is_answered(ended: Ended, tmp_path: Path) -> None:
    ended("finished", 0)  # for its srun and scontrol
    options = ["--job", "7", "--nodes", "node1", "--no-preflight", "--", f"run.dir={tmp_path}/other"]
    tool = subprocess.Popen([sys.executable, str(TOOL), *options], stdout=subprocess.PIPE, text=True)
    held = 0
    while not held >> signal.SIGUSR1 - 1 & 1:
        assert tool.poll() is None
        time.sleep(0.01)
        status = Path(f"/proc/{tool.pid}/status").read_text()
        held = int(status.partition("SigBlk:")[2].split()[0], 16)
    tool.send_signal(signal.SIGUSR1)
    out, _ = tool.communicate()
    assert (tool.returncode, out) == (0, "job 7 is queued again: SIGUSR1 asked it to end\n")
    assert (tmp_path / "log").read_text() == "requeue 7\n"


def test_group_of_a_users_folder_names_the_run_for_the_job_as_for_its_ranks(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs/subset").mkdir(parents=True)
    (tmp_path / "configs/subset/few.yaml").write_text("# @package _global_\nname: few\n")
    monkeypatch.chdir(tmp_path)
    words = ("run.dir=runs/${name}", "--config-dir", "configs", "+subset=few")
    (tmp_path / "run/logs").mkdir(parents=True)
    assert ended("", 143, *words)[1] == ["requeue 7"]
    assert (tmp_path / "runs/few/logs/restarts.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-m", "run.seed=1,2"), "-m starts several runs"),
        (("--cfg", "job"), "--cfg starts no run"),
        (("--config-dir", "nowhere"), "--config-dir is .*/nowhere, and there is no such folder"),
        (("+subset=few",), "there is no key subset"),
    ],
)
def test_words_of_another_command_than_one_run_end_the_job(
    ended: Ended, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        ended("", 0, *words)
    assert (tmp_path / "log").read_text() == "", "it is not queued again"
