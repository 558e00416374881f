"""Real ranks: programs started by tools/launch.py, as the trainer is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """run_ranks(script, *arguments, num_ranks=2, **environment) runs a Python file on ranks to its end."""

    def run(
        script: Path, *arguments: object, num_ranks: int = 2, timeout: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = [
            sys.executable,
            str(ROOT / "tools" / "launch.py"),
            "-n",
            str(num_ranks),
            "--script",
            str(script),
        ]
        return subprocess.run(
            [*launcher, "--", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
