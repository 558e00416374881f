"""Loss spikes are skipped, and many skips in a row roll the run back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import SharedError
from svd_ds.training.guard import Guard, GuardConfig, GuardState
from svd_ds.training.progress import Progress

GUARD = Guard(GuardConfig(loss_factor=3.0, norm_factor=10.0, window=4, max_skips=2))


def after(values: list[tuple[float, float]], guard: Guard = GUARD) -> GuardState:
    state = GuardState()
    for loss, norm in values:
        fault, state = guard.check(state, loss, norm)
        assert fault is None, fault
    return state


def test_spike_is_skipped_with_a_reason() -> None:
    calm = after([(0.5, 1.0), (0.4, 2.0), (0.6, 1.0), (0.5, 1.0)])
    assert GUARD.check(calm, 1.49, 9.9)[0] is None
    fault, state = GUARD.check(calm, 1.6, 1.0)
    assert fault == "the loss is 1.6, 3.2 times the median of the last 4"
    assert (state.skipped, state.consecutive_skips, state.losses) == (1, 1, calm.losses)
    fault, state = GUARD.check(state, 0.5, 11.0)
    assert fault == "the gradient norm is 11, 11 times the median of the last 4"
    fault, state = GUARD.check(state, 0.5, 1.0)
    assert fault is None
    assert (state.skipped, state.consecutive_skips) == (2, 0)
    assert state.losses == (0.4, 0.6, 0.5, 0.5), "the last window, without skipped steps"


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (0.5, math.inf, "the gradient norm is inf"),
    ],
)
def test_non_finite_step_is_skipped_from_the_first_step_on(loss: float, norm: float, expected: str) -> None:
    fault, state = Guard(GuardConfig(loss_factor=0, norm_factor=0)).check(GuardState(), loss, norm)
    assert fault == expected
    assert state == GuardState(skipped=1, consecutive_skips=1)


def test_without_enough_steps_there_is_no_bound() -> None:
    unknown = after([(0.5, 1.0), (50.0, 1.0), (0.5, 500.0)])
    assert (unknown.skipped, unknown.losses) == (0, (0.5, 50.0, 0.5))
    off = Guard(GuardConfig(loss_factor=0, norm_factor=0, window=4))
    unbounded = after([(0.5, 1.0)] * 4 + [(50.0, 500.0)], off)
    assert (unbounded.skipped, unbounded.norms[-1]) == (0, 500.0)


def test_too_many_consecutive_skips_roll_back_until_the_limit_ends_the_run() -> None:
    config = GuardConfig(loss_factor=3.0, window=2, max_skips=1, max_rollbacks=1)
    guard, saved = Guard(config), GuardState((0.5, 0.5), (1.0, 1.0), skipped=7, consecutive_skips=1)
    progress = Progress(Cursor(16, "f"), step=2, samples=16, guard=saved)
    state = GuardState(saved.losses, saved.norms, skipped=7).with_hardware_fault()
    for expected in (False, True):
        _, state = guard.check(state, math.nan, 1.0)
        assert guard.should_roll_back(state) is expected
    left = Progress(Cursor(80, "f"), step=10, samples=80, guard=state)
    again = left.rolled_back(progress)
    assert (again.step, again.samples, again.cursor.next_ordinal) == (2, 16, 80), "new clips at the old step"
    assert again.guard == GuardState(saved.losses, saved.norms, skipped=9, rollbacks=1, hardware_faults=1)
    state = again.guard
    for _ in range(2):
        _, state = guard.check(state, math.nan, 1.0)
    with pytest.raises(SharedError, match=r"2 steps in a row .*max_skips=1, .* 1 of guard\.max_rollbacks=1 "):
        guard.should_roll_back(state)


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    state = after([(0.1 + 0.2, 1 / 3), (1e-17, 3e8)])
    progress = Progress(Cursor(16, "f")).advance(Cursor(24, "f"), 8, state)
    (tmp_path / "state.json").write_text(progress.as_json())
    assert Progress.read(tmp_path / "state.json") == progress
    earlier = json.loads(progress.as_json())
    del earlier["guard"]["hardware_faults"]
    (tmp_path / "state.json").write_text(json.dumps(earlier))
    assert Progress.read(tmp_path / "state.json") == progress, "earlier versions did not count them"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_factor", 1.0),
        ("norm_factor", -2.0),
        ("window", 0),
        ("max_skips", -1),
        ("max_rollbacks", -1),
        ("recompute_tolerance", 1.0),
        ("recompute_tolerance", -0.1),
    ],
)
def test_config_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"guard\.{field} "):
        GuardConfig(**{field: value})  # type: ignore[arg-type]
