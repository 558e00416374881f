"""The sweep files with the real wandb client: trials on one machine, or on the nodes of a job."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from svd_ds.compose import compose
from tests.cluster.conftest import ROOT, Cluster, WandbServer, wait_until
from tests.runs import metrics

SWEEP = yaml.safe_load((ROOT / "sweeps/noise_schedule.yaml").read_text())
NOISES: list[str] = SWEEP["parameters"]["noise"]["values"]
"""Noise schedules, in the order of the grid."""
STEPS = 4


def small(folder: Path, *more: str, **settings: Any) -> Path:
    """Write to `folder` a sweep of noise schedules whose trials take seconds."""
    sweep = {**SWEEP, **settings}
    runs = f"run.dir={folder}/${{oc.env:WANDB_RUN_ID}}"
    words = ["debug=tiny", f"run.steps={STEPS}", "batch.size=4", "data.num_frames=2", "evaluation.every=0"]
    command = [runs if word.startswith("run.dir=") else word for word in sweep["command"]]
    sweep["command"] = [*command[:-1], *words, "sampling.num_steps=1", *more, command[-1]]
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def check_trial(run: dict[str, Any], folder: Path, noise: str) -> None:
    """Check that a trial had its own noise schedule, logged every step, and finished."""
    assert run["args"] == {"noise": noise}
    assert run["state"] == "finished" and run["exitcode"] == 0
    assert {row["train/step"] for row in run["history"]} >= set(range(1, STEPS + 1))
    settings = yaml.safe_load((folder / run["name"] / "config.yaml").read_text())
    assert settings["noise"] == asdict(compose([f"noise={noise}"]).noise)


@pytest.mark.slow
def test_agent_runs_three_trials(wandb_server: WandbServer, tmp_path: Path) -> None:
    sweep = wandb_server.sweep(small(tmp_path))
    wandb_server.run_client("wandb", "agent", "--count", "3", sweep, **wandb_server.environment)
    runs = wandb_server.ask("state")["runs"]
    assert len(runs) == 3
    for run, noise in zip(runs.values(), NOISES, strict=False):
        check_trial(run, tmp_path, noise)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_run_on_all_nodes_and_survive_the_loss_of_one(
    cluster: Cluster, wandb_server_of_cluster: WandbServer, tmp_path: Path
) -> None:
    """A node fails in the second of three trials."""
    server = wandb_server_of_cluster
    sweep = server.sweep(small(tmp_path, "checkpoint.every=2", run_cap=3))
    job = cluster.submit("slurm/sweep.sh", sweep, **server.environment)
    names = [f"{sweep.rpartition('/')[2]}-{i}" for i in range(3)]
    wait_until(lambda: len(metrics(tmp_path / names[1])) >= 2, "the second trial", 200)
    cluster.lose_a_node(job)
    ended = cluster.wait(job, 300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    runs = server.ask("state")["runs"]
    assert list(runs) == names
    for name, noise in zip(names, NOISES, strict=False):
        check_trial(runs[name], tmp_path, noise)
    assert runs[names[1]]["starts"] > runs[names[0]]["starts"], "its restart is the same W&B run"
    assert "ranks: 2 x cpu" in cluster.output(job)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trial_is_stopped_early_and_then_the_sweep_is_cancelled(
    cluster: Cluster, wandb_server_of_cluster: WandbServer, tmp_path: Path
) -> None:
    """Both would have trained much longer: the job ends, and is not requeued."""
    server = wandb_server_of_cluster
    sweep = server.sweep(small(tmp_path, "run.steps=100000", "checkpoint.every=100000"))
    job = cluster.submit("slurm/sweep.sh", sweep, **server.environment)
    names = [f"{sweep.rpartition('/')[2]}-{i}" for i in range(2)]
    wait_until(lambda: len(metrics(tmp_path / names[0])) >= 1, "the first trial", 200)
    server.ask(f"stop/{names[0]}")
    wait_until(lambda: len(metrics(tmp_path / names[1])) >= 1, "the second trial", 200)
    stopped = len(metrics(tmp_path / names[0]))
    checkpoints = [path.name for path in (tmp_path / names[0] / "checkpoints").glob("step-*")]
    assert checkpoints == [f"step-{stopped:07d}"], "it completed its step, saved it, and was not restarted"
    cluster.run("wandb", "sweep", "--cancel", sweep, **server.environment)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.output(job)
    assert list(server.ask("state")["runs"]) == names
