"""The numbers of a step: computed without a host read, then read together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.training import gradients
from svd_ds.training.gradients import GradientComputation, StepGradients
from tests.host_reads import HostReads

LOSSES = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
"""Losses of 4 clips in each of 3 micro-batches."""


def compute() -> StepGradients:
    frames = torch.zeros(4, 1, 3, 8, 8, dtype=torch.uint8)
    batches = [
        Batch(
            tuple(f"s{number}-{row}" for row in range(4)),
            (0, 1, 2, 3),
            frames,
            ("",) * 4,
            {},
            None,
            None,
            None,
            3,
        )
        for number in range(3)
    ]
    remaining = iter(LOSSES)
    norm = torch.tensor(2.5, dtype=torch.float64)
    terms = {"pixels": torch.tensor(0.5), "is_finite": torch.tensor(True)}

    def loss(net: Any, batch: Batch) -> Tensor:
        return next(remaining).clone().requires_grad_()

    engine: Any = SimpleNamespace(
        backward=lambda loss, num_micro_batches: loss.backward(),
        gradient_norm=lambda: norm,
    )
    objective: Any = SimpleNamespace(loss=loss, reduce_terms=lambda: terms)
    local_norm: Any = SimpleNamespace(take=lambda: None)
    computation = GradientComputation(engine, objective, local_norm, 0, torch.device("cpu"))
    with HostReads() as reads:
        found = computation.compute(batches)
    assert reads.places == []
    return found


def test_numbers_of_a_step_are_read_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    found, read, calls = compute(), gradients.read_scalars, []

    def count(scalars: list[Tensor]) -> list[float]:
        calls.append(len(scalars))
        return read(scalars)

    monkeypatch.setattr(gradients, "read_scalars", count)
    assert found.numbers.grad_norm == 2.5 and found.numbers.terms == {"pixels": 0.5, "is_finite": 1.0}
    assert found.numbers.loss == sum(loss_B.mean().item() for loss_B in LOSSES) / 3, "bit by bit"
    assert calls == [3 + 1 + 2], "one copy of three losses, the norm and two terms"
    assert found.clip_ids[:5] == ("s0-0", "s0-1", "s0-2", "s0-3", "s1-0")


def test_losses_of_clips_are_read_only_if_they_are_compared() -> None:
    losses, norm = compute().read_losses()
    assert losses == tuple(LOSSES.flatten().tolist()) and norm is None
