"""tools/job.py: which outcomes of a run requeue the job. srun and scontrol are fake programs."""

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
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.plan.planner import DoesNotFitError
from svd_ds.run_folder import RunFolder

TOOL = Path(__file__).parents[3] / "tools" / "job.py"
SRUN = """#!/bin/sh
# A signal to the job is passed on to its ranks.
if [ -n '{sent}' ]; then
  trap 'received=yes' USR1
  kill -{sent} $PPID
  while [ -z "$received" ]; do sleep 0.1; done
fi
[ -z '{kind}' ] ||
  echo '{{"kind": "{kind}", "rank": 1, "message": "its message", "restart_id": [7, 0], "nodes": {bad}}}' \
    > {run}/logs/outcome.json
echo "$SVD_DS_STARTED" >> {run}.started
exit {code}
"""
WITHOUT_NODE1 = ["requeuehold 7", "update JobId=7 ExcNodeList=node1", "release 7"]
EndJob = Callable[..., tuple[int, list[str], bool]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def end_job(
    tool: ModuleType,
    scontrol: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[EndJob]:
    """end_job(kind, code) -> the tool's exit code, its requests to scontrol, whether its trial is resumed."""
    run, trial = tmp_path / "run", tmp_path / "trial"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}

    def end(
        kind: str,
        code: int,
        *arguments: str,
        state: str = "RUNNING",
        sent: str = "",
        nodes: str = "node1",
        bad: Sequence[str] = (),
        check: Callable[..., dict[str, str]] = lambda *_: {},
        gpus: int = 0,
        options: Sequence[str] = (),
    ) -> tuple[int, list[str], bool]:
        log = scontrol(state)
        trial.touch()
        (tmp_path / "srun").write_text(
            SRUN.format(
                kind=kind, run=run, code=code, sent=sent, bad=json.dumps(dict.fromkeys(bad, "is broken"))
            )
        )
        (tmp_path / "srun").chmod(0o755)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setattr(tool, "failing_nodes", lambda job, folder, kernels: check(job, folder))
        monkeypatch.setattr(tool, "CLOCKS", tmp_path / "clocks")
        job = ["--job", "7", "--nodes", nodes, "--gpus", str(gpus), "--trial", str(trial), *options, "--"]
        monkeypatch.setattr(sys, "argv", ["job.py", *job, "debug=tiny", f"run.dir={run}", *arguments])
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
        ("finished", 143, "RUNNING", (0, ["requeue 7"], True)),  # a rank died after the run finished
        ("preempted", 0, "CANCELLED", (0, [], True)),
        ("failed", 143, "PREEMPTED", (143, [], True)),
    ],
)
def test_outcome_decides_if_the_job_is_requeued(
    end_job: EndJob, kind: str, code: int, state: str, expected: tuple[int, list[str], bool]
) -> None:
    assert end_job(kind, code, state=state) == expected


def test_usr1_requeues_the_job_and_term_ends_the_trial(end_job: EndJob) -> None:
    assert end_job("preempted", 0, sent="USR1") == (0, ["requeue 7"], True)
    assert end_job("preempted", 0, sent="TERM") == (0, [], False), "the agent stops the trial early"
    assert end_job("preempted", 0, sent="TERM", state="CANCELLED") == (0, [], True), "Slurm ends the job"


def test_reason_of_the_requeue_is_printed(end_job: EndJob, capsys: pytest.CaptureFixture[str]) -> None:
    end_job("failed", 143)
    assert capsys.readouterr().out == "job 7 is requeued: rank 1 failed: its message\n"


def test_wrong_key_starts_no_run(end_job: EndJob, tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        end_job("finished", 0, "optim.learning_rate=1")
    assert not (tmp_path / "trial").exists(), "the sweep's next trial may start"


def test_restarts_without_progress_are_limited(end_job: EndJob) -> None:
    for _ in range(3):
        assert end_job("failed", 143)[1] == ["requeue 7"]
    with pytest.raises(ValueError, match="3 times from step 0"):
        end_job("failed", 143)


@pytest.mark.parametrize(
    ("nodes", "faults", "requests"),
    [
        ("node1,node2", ["node1"], WITHOUT_NODE1),
        ("node1", ["node1"], WITHOUT_NODE1),
        ("node1,node2", ["node1", "node2"], ["requeue 7"]),  # the nodes are unlikely to be the cause
    ],
)
def test_job_is_requeued_without_a_failing_node(
    end_job: EndJob, nodes: str, faults: list[str], requests: list[str]
) -> None:
    for _ in range(3):
        found = end_job("", 0, nodes=nodes, check=lambda *_: dict.fromkeys(faults, "is broken"))
        assert found == (0, requests, True)
    with pytest.raises(ValueError, match="3 times from step 0"):
        end_job("", 0, nodes=nodes, check=lambda *_: dict.fromkeys(faults, "is broken"))


def test_torch_that_fits_no_node_ends_the_job(end_job: EndJob, tmp_path: Path) -> None:
    def refuse(*_: object) -> dict[str, str]:
        raise ValueError("torch cannot use the NVIDIA GPUs")

    with pytest.raises(ValueError, match="cannot use the NVIDIA GPUs"):
        end_job("", 0, check=refuse)
    assert (tmp_path / "log").read_text() == "", "not requeued"
    assert not (tmp_path / "trial").exists(), "the sweep's next trial may start"


@pytest.mark.parametrize(
    ("nodes", "bad", "requests"),
    [
        ("node1,node2", ["node1"], WITHOUT_NODE1),
        ("node1", ["node1"], WITHOUT_NODE1),
        ("node1,node2", ["node1", "node2"], ["requeue 7"]),  # the nodes are unlikely to be the cause
        ("node1,node2", ["node1", "stranger"], WITHOUT_NODE1),
        ("node1,node2", ["stranger"], ["requeue 7"]),
    ],
)
def test_job_is_requeued_without_a_node_that_computed_wrongly(
    end_job: EndJob, nodes: str, bad: list[str], requests: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert end_job("bad nodes", 0, nodes=nodes, bad=bad) == (0, requests, True)
    if requests == WITHOUT_NODE1:
        assert "job 7 is requeued without node1: node1 is broken" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 times from step 0"):
        end_job("bad nodes", 0, nodes=nodes, bad=bad)


@pytest.mark.parametrize(
    ("overrides", "tried"),
    [
        (["model.kernels=torch", "model.spatial_attention=flash_attn"], ("torch", "flash_attn", "auto")),
        (["task=decoder"], None),
    ],
)
def test_nodes_try_the_kernels_of_the_config(
    overrides: list[str],
    tried: tuple[str, str, str] | None,
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(tool, "failing_nodes", lambda job, folder, kernels: given.append(kernels) or {})
    job: Any = SimpleNamespace()
    assert tool.check_nodes(compose(["debug=tiny", *overrides]), job, RunFolder(Path("run"))) == {}
    (kernels,) = given
    assert (None if kernels is None else (kernels.kernels, *kernels.attention.values())) == tried


def test_checks_that_end_with_the_job_exclude_no_node(end_job: EndJob) -> None:
    silent = {"node1": "does not answer"}

    def killed(*_: object) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return silent

    assert end_job("", 0, check=lambda *_: silent, state="CANCELLED") == (0, [], True)
    assert end_job("", 0, check=lambda *_: silent, state="PENDING") == (0, [], True), (
        "requeued by another program"
    )
    assert end_job("", 0, check=killed) == (0, ["requeue 7"], True)


def test_folder_named_by_the_time_is_the_same_in_all_restarts(
    end_job: EndJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        (tmp_path / "run/logs").mkdir(parents=True, exist_ok=True)
        assert end_job("", 143, folder)[1] == ["requeue 7"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(ValueError, match=f"{tmp_path}/runs/.* 3 times from step 0"):
        end_job("", 143, folder)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "logs/restarts.jsonl").read_text().count("\n") == 3
    start_times = (tmp_path / "run.started").read_text().split()
    assert len(start_times) == 3 and len(set(start_times)) == 1, "the ranks use the same folder"
    assert datetime.fromisoformat(start_times[0]).strftime("%H-%M-%S-%f") == run.name
    assert not list((tmp_path / "clocks").iterdir()), "a job that has ended leaves no files"


def test_reused_job_id_gets_a_new_time(
    end_job: EndJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    (tmp_path / "run/logs").mkdir(parents=True)
    for _ in range(2):
        end_job("", 143, f"run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_signal_during_imports_is_handled(end_job: EndJob, tmp_path: Path) -> None:
    end_job("finished", 0)  # for its srun and scontrol
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
    assert (tool.returncode, out) == (0, "job 7 is requeued: SIGUSR1 asked it to end\n")
    assert (tmp_path / "log").read_text() == "requeue 7\n"


def test_job_and_ranks_use_the_same_name_from_a_config_dir(
    end_job: EndJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs/subset").mkdir(parents=True)
    (tmp_path / "configs/subset/few.yaml").write_text("# @package _global_\nname: few\n")
    monkeypatch.chdir(tmp_path)
    words = ("run.dir=runs/${name}", "--config-dir", "configs", "+subset=few")
    (tmp_path / "run/logs").mkdir(parents=True)
    assert end_job("", 143, *words)[1] == ["requeue 7"]
    assert (tmp_path / "runs/few/logs/restarts.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "run.seed=1,2"), "-m starts several runs"),
        (("--cfg", "job"), "--cfg starts no run"),
        (("--config-dir", "nowhere"), "--config-dir is .*/nowhere, and there is no such folder"),
        (("+subset=few",), "there is no key subset"),
    ],
)
def test_arguments_that_do_not_start_one_run_end_the_job(
    end_job: EndJob, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        end_job("", 0, *words)
    assert (tmp_path / "log").read_text() == "", "it is not requeued"


def plan_with(tool: ModuleType, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the job a GPU and a plan."""
    monkeypatch.setattr(tool, "query_gpu", lambda: None)
    monkeypatch.setattr(tool, "check_fits", check)


def test_run_that_cannot_fit_starts_no_rank(
    end_job: EndJob, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: RunConfig, gpu: None, ranks: int, gpus_per_node: int, profile_fn: object) -> str:
        assert (ranks, gpus_per_node, config.run.dir) == (16, 8, str(tmp_path / "run"))
        raise DoesNotFitError("it needs 89 GiB")

    plan_with(tool, refuse, monkeypatch)
    with pytest.raises(DoesNotFitError, match="it needs 89 GiB"):
        end_job("finished", 0, nodes="node1,node2", gpus=8)
    outcome = json.loads((tmp_path / "run/logs/outcome.json").read_text())
    assert (outcome["kind"], outcome["message"]) == ("refused", "it needs 89 GiB")
    assert not (tmp_path / "run.started").exists()
    assert (tmp_path / "log").read_text() == "", "not requeued"
    assert not (tmp_path / "trial").exists(), "the sweep's next trial may start"
    assert end_job("finished", 0, nodes="node1,node2", gpus=8, options=["--no-plan"])[0] == 0
    assert (tmp_path / "run.started").exists()


def test_plan_is_printed_and_a_failed_one_starts_the_run(
    end_job: EndJob, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_with(tool, lambda *_: "plan: 15.7 GiB", monkeypatch)
    assert end_job("finished", 0, gpus=8)[0] == 0
    assert capsys.readouterr().out == "plan: 15.7 GiB\n"

    def fail(*_: object) -> str:
        raise RuntimeError("no compiler")

    plan_with(tool, fail, monkeypatch)
    assert end_job("finished", 0, gpus=8)[0] == 0
    assert "the run starts without a plan of its memory: no compiler" in capsys.readouterr().out


def test_job_without_gpus_is_not_planned(
    end_job: EndJob, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError("nothing is planned")

    plan_with(tool, never, monkeypatch)
    assert end_job("finished", 0)[0] == 0
