from __future__ import annotations

import math
from pathlib import Path

import pytest

from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import SharedError
from svd_ds.training.guard import Guard, GuardConfig, GuardState
from svd_ds.training.state import Progress

GUARD = Guard(GuardConfig(loss_factor=3.0, norm_factor=10.0, window=4, max_skips=2))


def after(values: list[tuple[float, float]], guard: Guard = GUARD) -> GuardState:
    state = GuardState()
    for loss, norm in values:
        fault, state = guard.judge(state, loss, norm)
        assert fault is None, fault
    return state


def test_a_spike_is_skipped_and_named() -> None:
    calm = after([(0.5, 1.0), (0.4, 2.0), (0.6, 1.0), (0.5, 1.0)])
    assert GUARD.judge(calm, 1.49, 9.9)[0] is None
    fault, state = GUARD.judge(calm, 1.6, 1.0)
    assert fault == "the loss is 1.6, 3.2 times the median of the last 4"
    assert (state.skipped, state.in_a_row, state.losses) == (1, 1, calm.losses)
    fault, state = GUARD.judge(state, 0.5, 11.0)
    assert fault == "the gradient norm is 11, 11 times the median of the last 4"
    fault, state = GUARD.judge(state, 0.5, 1.0)
    assert fault is None
    assert (state.skipped, state.in_a_row) == (2, 0)
    assert state.losses == (0.4, 0.6, 0.5, 0.5), "the last window, without what was skipped"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.inf)])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    fault, state = Guard(GuardConfig(loss_factor=0, norm_factor=0)).judge(GuardState(), loss, norm)
    assert fault is not None and ("nan" in fault or "inf" in fault)
    assert state == GuardState(skipped=1, in_a_row=1)


def test_no_level_no_bound() -> None:
    unknown = after([(0.5, 1.0), (50.0, 1.0), (0.5, 500.0)])
    assert (unknown.skipped, unknown.losses) == (0, (0.5, 50.0, 0.5))
    off = Guard(GuardConfig(loss_factor=0, norm_factor=0, window=4))
    unbounded = after([(0.5, 1.0)] * 4 + [(50.0, 500.0)], off)
    assert (unbounded.skipped, unbounded.norms[-1]) == (0, 500.0)


def test_too_many_in_a_row_end_the_run() -> None:
    state = GuardState()
    for _ in range(2):
        _, state = GUARD.judge(state, math.nan, 1.0)
    with pytest.raises(
        SharedError, match=r"3 steps in a row .* guard\.max_skips=2: in the last one the loss is nan"
    ):
        GUARD.judge(state, math.nan, 1.0)


def test_what_it_remembers_survives_a_checkpoint(tmp_path: Path) -> None:
    state = after([(0.1 + 0.2, 1 / 3), (1e-17, 3e8)])
    progress = Progress(Cursor(16, "f")).advance(Cursor(24, "f"), 8, state)
    progress.write(tmp_path / "state.json")
    assert Progress.read(tmp_path / "state.json") == progress


@pytest.mark.parametrize(
    ("field", "value"), [("loss_factor", 1.0), ("norm_factor", -2.0), ("window", 0), ("max_skips", -1)]
)
def test_nonsense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"guard\.{field} "):
        GuardConfig(**{field: value})  # type: ignore[arg-type]
