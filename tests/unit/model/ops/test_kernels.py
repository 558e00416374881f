"""The Triton kernels compile for GPUs, which finds most errors that Triton's interpreter does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svd_ds.model.ops.fused import triton_installed

KERNELS = {
    "statistics", "combine_statistics", "normalise", "gradient_sums", "combine_gradient_sums",
    "norm_backward", "geglu_kernel", "attend", "attend_backward",
}  # fmt: skip
ARCHITECTURES = {80, 90}
"""A100 and H100."""


@pytest.mark.slow
def test_every_kernel_compiles_reads_wide_and_spills_nothing(tmp_path: Path) -> None:
    if not triton_installed():
        pytest.skip("Triton is not installed")
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, str(script), *map(str, ARCHITECTURES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads(line) for line in ended.stdout.splitlines()]
    found = {(report["name"], report["architecture"]) for report in reports}
    assert found == {(name, architecture) for name in KERNELS for architecture in ARCHITECTURES}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["wide_reads"] or report["name"].startswith("combine_"), report
