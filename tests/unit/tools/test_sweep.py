"""tools/sweep.py: wandb's own agent with a fake server and fake trials, and how its job ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from wandb.apis.public import sweeps

from svd_ds.jobs.slurm import Job

TOOL = Path(__file__).parents[3] / "tools" / "sweep.py"
SCONTROL = """#!/bin/sh
[ "$1" = show ] && exec cat {folder}/state
echo "$@" >> {folder}/log
echo JobState=PENDING > {folder}/state
"""
SETTLE = "import os; os.remove(unfinished)\n"
REQUEST = "import os, signal; os.kill(os.getppid(), signal.SIGUSR1)\n"
HANDLE = """
import signal, sys, time
requests = []
signal.signal(signal.SIGUSR1, lambda *_: requests.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
while not requests:
    time.sleep(0.01)
"""
RECORD = "open('arguments', 'a').write(sys.argv[1])\n"


class JobEnd(NamedTuple):
    """Exit code and effects of a job."""

    code: int
    requests: list[str]
    """Requests to scontrol."""
    commands: int
    """Number of commands that the agent received: two trials, and the end of the sweep."""


@pytest.fixture
def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JobEnd]]:
    """run_job(trial): how a job ended whose two trials are the Python program `trial`."""
    spec = importlib.util.spec_from_file_location("sweep", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    (tmp_path / "scontrol").write_text(SCONTROL.format(folder=tmp_path))
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)

    def run(trial: str, at_start: Callable[[], None] = lambda: None) -> JobEnd:
        agent = _agent(tool, trial)
        given = []

        def heartbeat(*_: object) -> list[dict[str, Any]]:
            if agent._run_processes:
                return []
            given.append({"type": "run" if len(given) < 2 else "exit", "run_id": f"r{len(given)}"})
            return [given[-1] | {"program": "", "args": {"optim.lr": {"value": 1}}}]

        def register(*_: object, **__: object) -> dict[str, str]:
            at_start()
            return {"id": "agent"}

        config = "command: [python, -m, svd_ds.train, '${args_no_hyphens}']"
        monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *_: {"config": config})
        monkeypatch.setattr(sweeps, "_register_agent", register)
        monkeypatch.setattr(sweeps, "_agent_heartbeat", heartbeat)
        (tmp_path / "state").write_text("JobState=RUNNING")
        (tmp_path / "log").write_text("")
        code = 0
        try:
            agent.run()
            agent.end()
        except SystemExit as exit:
            code = exit.code
        return JobEnd(code, (tmp_path / "log").read_text().splitlines(), len(given))

    def _agent(tool: ModuleType, trial: str) -> Any:
        monkeypatch.setattr(tool.wandb, "Api", lambda: None)
        agent = tool.JobAgent("sweep", Job("7", ("node1",), 1, 0, 3, preflight=False), ["run.steps=2"])
        agent.POLL_INTERVAL = 0.02
        agent.start = [sys.executable, "-c", f"unfinished = {str(agent.unfinished)!r}\n{trial}"]
        return agent

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_finished_sweep_ends_the_job(run_job: Callable[..., JobEnd]) -> None:
    assert run_job("import sys\n" + RECORD + SETTLE) == (0, [], 3)
    assert Path("arguments").read_text() == "optim.lr=1" * 2


@pytest.mark.parametrize("code", [1, 2])
def test_trial_that_cannot_resume_fails_the_job(run_job: Callable[..., JobEnd], code: int) -> None:
    """If scontrol fails, the next restart of the job begins with that trial."""
    assert run_job(f"raise SystemExit({code})") == (code, [], 1)


def test_trial_whose_process_is_killed_is_restarted(
    run_job: Callable[..., JobEnd], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job("import os; os.kill(os.getpid(), 9)") == (0, ["requeue 7"], 1)
    assert "job 7 is requeued: signal 9 ended the trial's own process\n" in capfd.readouterr().out
    assert run_job("import sys\n" + RECORD + SETTLE) == (0, [], 3)
    assert Path("arguments").read_text() == "optim.lr=1" * 3, "the unfinished trial comes first"


@pytest.mark.parametrize("content", [b"", b"\0\0", b'{"run'])
def test_damaged_file_of_the_unfinished_trial_does_not_end_the_sweep(
    run_job: Callable[..., JobEnd], capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    folder = Path("runs/sweeps/sweep")
    folder.mkdir(parents=True)
    (folder / "unfinished-7.json").write_bytes(content)
    assert run_job("import sys\n" + RECORD + SETTLE) == (0, [], 3)
    assert "unfinished-7.json is damaged" in capfd.readouterr().out
    assert (folder / "unfinished-7.json.damaged-1").read_bytes() == content


def test_job_requeued_by_its_trial_is_not_requeued_twice(run_job: Callable[..., JobEnd]) -> None:
    assert run_job("import os; os.system('scontrol requeue 7')") == (0, ["requeue 7"], 1)


def test_usr1_reaches_the_trial_during_its_start(run_job: Callable[..., JobEnd]) -> None:
    """The signal may arrive while Python starts; no other trial begins after this one."""
    assert run_job(REQUEST + HANDLE + RECORD + SETTLE) == (0, ["requeue 7"], 1)
    assert Path("arguments").exists(), "the trial handled the signal, and was not killed"


def test_usr1_between_trials_requeues_the_job(run_job: Callable[..., JobEnd]) -> None:
    assert run_job(SETTLE, at_start=lambda: os.kill(os.getpid(), signal.SIGUSR1)) == (0, ["requeue 7"], 0)
