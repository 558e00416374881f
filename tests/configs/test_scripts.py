"""The shell scripts parse, and the experiments that job scripts name exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from svd_ds.config import CONF, compose

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


def started(script: str, *arguments: str, **variables: str) -> str:
    """What slurm/SCRIPT would start, with Slurm's commands and Python in their places."""
    stubs = """
        scontrol() { echo node1; echo node2; }
        srun() { shift 2; echo "$*"; }
        export SLURM_JOB_ID=1 SLURM_JOB_NODELIST=node[1-2] SVD_DS_PYTHON=echo
    """
    ended = subprocess.run(
        ["bash", "-c", f'{stubs}\n. slurm/{script} "$@"', script, *arguments],
        cwd=ROOT,
        env={**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.strip()


def trained(script: str, *arguments: str) -> str:
    job, _, words = started(script, *arguments).partition(" -- ")
    assert job == "tools/job.py --job 1 --nodes node1,node2 --cpus 1 --gpus 0"
    return words


def test_other_scripts_hand_their_arguments_on() -> None:
    assert started("encode.sh", "in", "out", "--size", "8x8") == "echo tools/encode.py in out --size 8x8"
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert started("curate.sh", "in", "out", **array).endswith("in out --workers 1 --part 2/4")
    assert started("curate.sh", "in", "out").endswith("in out --workers 1")
    sweep = started("sweep.sh", "me/svd/abc", "optim.lr=1")
    assert sweep.startswith("tools/sweep.py --job 1 --nodes node1,node2 ")
    assert sweep.endswith(" -- me/svd/abc optim.lr=1")


def test_job_scripts_start_experiments_that_exist() -> None:
    for script in (path.name for path in SCRIPTS if path.name.startswith("stage")):
        name = trained(script).removeprefix("+experiment=")
        assert (CONF / "experiment" / f"{name}.yaml").exists(), f"{script}: {name}"
    assert trained("stage2.sh", "debug=tiny", "x=a b") == "+experiment=stage2 debug=tiny x=a b"
    assert trained("stage3.sh", "multiview", "run.steps=2") == "+experiment=multiview run.steps=2"
    documented = [*SCRIPTS, *(CONF / "experiment").glob("*.yaml")]
    named = {name for path in documented for name in re.findall(r"stage\d\.sh (\w+) ", path.read_text())}
    assert "multiview" in named
    for name in named:
        assert (CONF / "experiment" / f"{name}.yaml").exists(), name


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_files_make_runs_that_compose(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of each parameter, as wandb's agent would write it."""
    sweep = yaml.safe_load(path.read_text())
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "IMAGE_MODEL"):
        monkeypatch.setenv(name, f"its-{name.lower()}")
    command = sweep["command"]
    assert command[:4] == ["${env}", "python", "-m", "svd_ds.train"] and command[-1] == "${args_no_hyphens}"
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values") or (parameter["min"], parameter["max"]):
            config = compose([*command[4:-1], f"{name}={value}"])
            assert config.run.dir == "runs/sweeps/its-wandb_sweep_id/its-wandb_run_id"
