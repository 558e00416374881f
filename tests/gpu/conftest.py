"""Tests that need a GPU; they are skipped without one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    # float32 is to be float32: torch has TF32 off for products, but on for convolutions.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
