"""Subprocess of the tests in this folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svd_ds.plan.fake_cuda import COMPILERS

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)),
    reason=f"fake CUDA devices need a C++ compiler: none of {', '.join(COMPILERS)} is on the PATH",
)


def run_steps(cases: list[str], root: Path = ROOT) -> dict[str, Any]:
    """Run cases of run_steps.py with the package in `root`."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_steps.py")), *cases],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
