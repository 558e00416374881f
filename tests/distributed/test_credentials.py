"""A token in data.path reaches the data set, and no file, line or W&B record of the runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2hunter2"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_token_of_a_data_set_is_stored_nowhere(shards: Path, tmp_path: Path) -> None:
    # Shards are served only with the token.
    gate = tmp_path / "gate.sh"
    gate.write_text(f'[ "$TOKEN" = "${{3%1}}" ] && cat "{shards}/$1"\n')
    small = ["debug=tiny", "data.num_frames=3", "evaluation.every=0", "sampling.every=100000", "run.steps=1"]
    common = [*small, "data.num_workers=1", f"data.cache={tmp_path}/cache", f"run.dir={tmp_path}/run"]

    def train(command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "svd_ds.train", *common, f"data.path=pipe:{command}", *words],
            cwd=tmp_path,
            env=os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    command = f"TOKEN={SECRET} sh {gate} {{}} --token {SECRET}1"
    ended = train(command, "-m", "run.seed=0,1")
    assert ended.returncode == 0, ended.stderr
    refused = train(f"TOKEN={SECRET} sh {gate} {{}} --token {SECRET}2", "run.seed=3")
    assert refused.returncode == 2 and "cannot be fetched" in refused.stderr, refused.stderr
    assert SECRET not in ended.stdout + ended.stderr + refused.stdout + refused.stderr

    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != gate]
    names = {path.name for path in files}
    assert {"config.yaml", "multirun.yaml", "train.log", "outcome.json", "report.html"} <= names
    assert any(path.suffix == ".wandb" for path in files), "W&B's client has its own record"
    assert not [path for path in files if SECRET in str(path) or SECRET.encode() in path.read_bytes()]

    renewed = train(
        f"TOKEN=renewed sh {gate} {{}} --token renewed1", f"run.dir={tmp_path}/run-run.seed_0", "run.steps=2"
    )
    assert renewed.returncode == 0 and "resuming at step 1" in renewed.stdout, renewed.stderr
