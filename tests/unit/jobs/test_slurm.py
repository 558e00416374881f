"""Slurm job, controlled from its batch host, with scripts in place of scontrol and srun."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from svd_ds.jobs import slurm
from svd_ds.jobs.slurm import Job

SCONTROL = """#!/bin/sh
kill -TERM $$  # as Slurm does, once the job is requeued
echo "$@" >> {log}
case "$*" in
"show job"*) echo "JobId=7 JobState={state} ExcNodeList=node[8-9] Requeue=1" ;;
"show hostnames"*) echo node8; echo node9 ;;
requeue*) [ {allowed} = yes ] || {{ echo "requests are disabled" >&2; exit 1; }} ;;
esac
"""
JOB = Job("7", ("node1", "node2"), cpus=4, gpus=8, max_restarts=5, preflight=False, plan=False)


def scontrol(
    folder: Path, monkeypatch: pytest.MonkeyPatch, state: str = "RUNNING", allowed: str = "yes"
) -> Path:
    """Put a scontrol on the PATH that appends its arguments to the returned file."""
    log = folder / "log"
    program = folder / "scontrol"
    program.write_text(SCONTROL.format(log=log, state=state, allowed=allowed))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


def test_job_is_built_from_its_options() -> None:
    parser = ArgumentParser()
    Job.add_options(parser)
    assert Job.from_options(parser.parse_args(JOB.to_options())) == JOB
    options = parser.parse_args(["--job", "7", "--nodes", "a"])
    assert Job.from_options(options) == Job("7", ("a",), 1, 0, 3, True)


@pytest.mark.parametrize(("state", "running"), [("RUNNING", True), ("CANCELLED", False), ("PENDING", False)])
def test_only_a_running_job_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, running: bool
) -> None:
    scontrol(tmp_path, monkeypatch, state)
    assert JOB.is_running() == running


def test_nodes_are_excluded_while_the_job_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = scontrol(tmp_path, monkeypatch)
    JOB.requeue()
    assert log.read_text().splitlines() == ["requeue 7"]
    JOB.requeue(exclude=["node2"])
    changes = [line for line in log.read_text().splitlines()[1:] if not line.startswith("show")]
    assert changes == ["requeuehold 7", "update JobId=7 ExcNodeList=node8,node9,node2", "release 7"]


def test_error_of_a_site_that_forbids_requeues_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol(tmp_path, monkeypatch, allowed="no")
    with pytest.raises(OSError, match="scontrol requeue 7: requests are disabled"):
        JOB.requeue()


def test_scontrol_waits_for_a_controller_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "RETRY_WAITS_S", (0.0, 0.0))
    program = tmp_path / "scontrol"
    program.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/log\n[ $(wc -l < {tmp_path}/log) -gt 2 ] && exit 0\n"
        "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    JOB.requeue()
    assert (tmp_path / "log").read_text() == "x\n" * 3


def test_step_is_an_srun_with_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "srun"
    program.write_text(f'#!/bin/sh\necho "$WHERE $@" > {tmp_path}/log\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert JOB.start_step(["train", "a b"], "--nodes=2", WHERE="node1").wait() == 3
    command = (tmp_path / "log").read_text().strip()
    assert command == "node1 --kill-on-bad-exit=1 --cpus-per-task=4 --nodes=2 train a b"
