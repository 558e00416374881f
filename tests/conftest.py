"""Settings of every test, and how pytest-xdist divides the tests over its workers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# One thread a process: tests of several ranks share few cores, and sums in one order make results repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels are tested as Python. Triton reads this when anyone first imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # A torch for CPUs on a machine with GPUs: the tests use the CPUs on purpose (svd_ds.parallel.devices).
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, because fixtures of a file are slow, and one worker all of tests/cluster,
    because there can be one cluster at a time."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            cluster = "tests/cluster"
            return cluster if nodeid.startswith(f"{cluster}/") else super()._split_scope(nodeid)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
