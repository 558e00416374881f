"""A run on a real two-node Slurm cluster: it finishes, or is interrupted and resumes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, wait_until
from tests.runs import metrics

STEPS = 8
SMALL = (
    "debug=tiny",
    f"run.steps={STEPS}",
    "data.num_frames=2",
    "batch.size=4",
    "checkpoint.every=2",
    "evaluation.every=0",
    "sampling.num_steps=1",
)


def submit(cluster: Cluster, run: Path, *overrides: str, **environment: str) -> str:
    return cluster.submit("slurm/stage2.sh", *SMALL, f"run.dir={run}", *overrides, **environment)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in metrics(run)]


def rank_process(job: str, rank: int) -> int:
    """Process id of a rank of `job`, on whichever node."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        placed = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(environment)
        if placed and b"svd_ds.train" in command and b"srun" not in command[0]:
            return int(folder.name)
    raise AssertionError(f"job {job} has no rank {rank}")


def send_time_limit_signal(cluster: Cluster, job: str) -> None:
    """Send the signal of #SBATCH --signal=B:USR1@300, as Slurm does when the time is almost up."""
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def kill_a_rank(cluster: Cluster, job: str) -> None:
    os.kill(rank_process(job, 1), signal.SIGKILL)


def hang_a_rank(cluster: Cluster, job: str) -> None:
    os.kill(rank_process(job, 1), signal.SIGSTOP)


def power_off_a_node(cluster: Cluster, job: str) -> None:
    cluster.lose_a_node(job)


def power_off_the_batch_host(cluster: Cluster, job: str) -> None:
    cluster.lose_a_node(job, 0)


def preempt(cluster: Cluster, job: str) -> None:
    """Requeue the job, as Slurm does with PreemptMode=REQUEUE: SIGTERM to all of its processes."""
    cluster.run("scontrol", "requeue", job)


INTERRUPTIONS = [
    send_time_limit_signal,
    preempt,
    kill_a_rank,
    hang_a_rank,
    power_off_a_node,
    power_off_the_batch_host,
]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_run_resumes_after_an_interruption(
    interrupt: Callable[[Cluster, str], None], cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    preflight = {"SVD_DS_JOB_OPTIONS": ""} if interrupt is send_time_limit_signal else {}
    watchdog = ["watchdog.minutes=0.2", "watchdog.first_minutes=3"] if interrupt is hang_a_rank else []
    job = submit(cluster, run, *watchdog, **preflight)
    # A save is committed after a later step: the restart needs a committed one.
    wait_until(lambda: any(run.glob("checkpoints/step-*/COMPLETE")), "checkpoint")
    interrupt(cluster, job)
    ended = cluster.wait(job, 300)
    output = cluster.output(job)
    assert ended["JobState"] == "COMPLETED", output
    assert ended["ExitCode"] == "0:0"
    assert ended["Restarts"] == "1", output
    assert steps(run) == list(range(1, STEPS + 1)), "every step once"
    assert "ranks: 2 x cpu" in output
    assert "resuming at step " in output
    last = run / "checkpoints" / f"step-{STEPS:07d}"
    assert len(list(last.glob("adam-exp_avg/rank-*-of-00002.safetensors"))) == 2, "ZeRO-3, a shard a rank"
    if interrupt is hang_a_rank:
        for rank in range(2):
            stacks = (run / f"logs/rank-0000{rank}.log").read_text()
            assert "Timeout" in stacks and "training/loop.py" in stacks, stacks
        assert output.count("no step for 0.2 minutes") == 2, (
            "printed by the rank, and as the reason why the job is requeued"
        )


def test_invalid_setting_fails_the_job_once(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "optim.learning_rate=1")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    errors = [line for line in cluster.output(job).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, cluster.output(job)


@pytest.mark.slow
def test_error_found_by_the_ranks_fails_the_job_once(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "data.path=nowhere")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    errors = [line for line in cluster.output(job).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, cluster.output(job)


@pytest.mark.slow
def test_cancelled_run_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """SIGTERM makes its ranks save a checkpoint."""
    run = tmp_path / "run"
    job = submit(cluster, run, "checkpoint.every=1000", "run.steps=1000")
    wait_until(lambda: len(steps(run)) >= 2, "step 2")
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    time.sleep(6)  # a requeue would show by now
    ended = cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)


@pytest.mark.slow
def test_node_that_does_not_see_the_run_is_named_and_excluded(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    unmounted = "node2"
    cluster.run_on_node(unmounted, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run))
    try:
        job = submit(cluster, run, "run.steps=1", SVD_DS_JOB_OPTIONS="")
        ended = cluster.wait(job)
    finally:
        cluster.run_on_node(unmounted, "umount", str(run))
    output = cluster.output(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    assert ended["ExcNodeList"] == unmounted
    assert f"requeued without {unmounted}: {unmounted} does not answer, or cannot write" in output
    assert output.count("bandwidth between nodes, ") == 1, "of the two nodes that remain"


@pytest.mark.slow
def test_memory_that_runs_out_in_the_first_step_fails_the_job_once(cluster: Cluster, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent / "faulty"), cluster.environment["PYTHONPATH"]])
    job = submit(cluster, tmp_path / "run", FAULTS="memory:1", PYTHONPATH=path)
    ended = cluster.wait(job)
    output = cluster.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1: out of GPU memory before the first step is complete"), output


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_node_that_computes_wrongly_is_named_and_excluded(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parent / "faulty"), cluster.environment["PYTHONPATH"]])
    job = submit(cluster, run, "checkpoint.every=1000", FAULTS="loss:3", PYTHONPATH=path)
    ended = cluster.wait(job, 300)
    output = cluster.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    wrong = ended["ExcNodeList"]
    assert f"rank 1 on {wrong} computed a loss of nan, then " in output
    assert f"stopped at step 3: the job is requeued without {wrong}" in output
    assert f"job {job} is requeued without {wrong}: {wrong} computed a loss of nan, then " in output
    assert "resuming at step 3" in output, "the step was taken and saved"
    assert steps(run) == list(range(1, STEPS + 1)), "every step once"
    assert [row["hardware_faults"] for row in metrics(run)] == [0, 0] + [1] * (STEPS - 2)
    assert metrics(run)[-1]["skipped"] == 0


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_restart_resumes_the_newest_checkpoint_and_not_the_named_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm restarts the job with the same run.resume=PATH, whose checkpoint is removed by keep_last. The
    run folder is named after the time, which is the same in each restart."""
    other = tmp_path / "other"
    job = submit(cluster, other, "run.steps=2")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    named = f"run.resume={other}/checkpoints/step-0000002"
    job = submit(cluster, tmp_path / "runs" / "${now:%H-%M-%S-%f}", named, "run.steps=8")
    wait_until(lambda: any(steps(run)[-1:] > [4] for run in tmp_path.glob("runs/*")), "step 5")
    send_time_limit_signal(cluster, job)
    ended = cluster.wait(job, 300)
    output = cluster.output(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    (run,) = tmp_path.glob("runs/*")
    assert steps(run) == list(range(3, 9)), "every step once"
    assert "resuming at step 2" in output and "from which the run's own" in output
    assert (run / "logs/restarts.jsonl").read_text().count("\n") == 4, "each restart queued, then acquired"
