"""What every test stands on."""

from __future__ import annotations

import os

import pytest
import torch

# One thread a process: tests of several ranks share few cores, and sums in one order make results repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels are tested as Python. Triton reads this when anyone first imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
