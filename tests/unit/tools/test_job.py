"""tools/job.py: which ends of a run deserve another life. srun and scontrol are programs of the test."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
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
  echo '{{"kind": "{kind}", "rank": 1, "words": "its words", "attempt": [7, 0]}}' > {run}/logs/outcome.json
exit {code}
"""
SCONTROL = """#!/bin/sh
case "$1" in show) echo "JobState={state}" ;; *) echo "$@" >> {log} ;; esac
"""
Ended = Callable[..., tuple[int, list[str], bool]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ended(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ended]:
    """ended(kind, code): the tool's exit code, what it asked of scontrol, whether its trial goes on."""
    run, log, trial = tmp_path / "run", tmp_path / "log", tmp_path / "trial"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}

    def end(
        kind: str, code: int, *arguments: str, state: str = "RUNNING", asked: str = ""
    ) -> tuple[int, list[str], bool]:
        log.write_text("")
        trial.touch()
        programs = {
            "srun": SRUN.format(kind=kind, run=run, code=code, asked=asked),
            "scontrol": SCONTROL.format(state=state, log=log),
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        options = ["--job", "7", "--nodes", "node1", "--no-preflight", "--trial", str(trial), "--"]
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
        ("interrupted", 143, "RUNNING", (130, [], False)),
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
