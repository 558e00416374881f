"""The shell scripts parse, and the experiments that job scripts name exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from svd_ds.config import CONF

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


def test_job_scripts_name_experiments_that_exist() -> None:
    named = {name for script in SCRIPTS for name in re.findall(r"\+experiment=(\w+)", script.read_text())}
    assert named
    for name in named:
        assert (CONF / "experiment" / f"{name}.yaml").exists(), name
