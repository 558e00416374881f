"""Peak memory of a step as a function of the micro-batch, from one run with a tracker.

Each storage is constant, proportional to the micro-batch, or proportional to the frames that the autoencoder
encodes at once. So the bytes at any moment of the step are known for every micro-batch size, and the moments
that are the peak at some size are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from svd_ds.plan.fake_step import StepRun
from svd_ds.plan.records import CLIP, CONSTANT
from svd_ds.plan.step_profile import PHASES, Amount, MemoryPoint, sum_amounts
from svd_ds.plan.tracker import StepTracker

MAX_MICRO_BATCH = 1024
"""Largest micro-batch size for which the peak is known."""


def memory_points(tracker: StepTracker, clips: int, chunk: int) -> tuple[MemoryPoint, ...]:
    """Return the moments that are the peak of their phase at some micro-batch size.

    Args:
        clips: micro-batch size of the run.
        chunk: frozen.chunk.
    """
    amounts = [_amount(tracker, index, clips) for index in range(len(tracker.storages))]
    indices = sorted({moment for phase in PHASES for moment in _peaks(tracker, amounts, phase, chunk)})
    points, live, wanted = [], set(), iter(indices)
    next_moment = next(wanted, None)
    for moment, event in enumerate(tracker.events):
        if event.storage >= 0:
            live.add(event.storage)
        else:
            live.discard(~event.storage)
        if moment == next_moment:
            points.append(_point(tracker, amounts, moment, live))
            next_moment = next(wanted, None)
    return tuple(points)


def kept_bytes(run: StepRun, clips: int) -> Amount:
    """Return the bytes between forward and backward pass."""
    return sum_amounts(_amount(run.tracker, index, clips) for index in run.kept)


def _amount(tracker: StepTracker, index: int, clips: int) -> Amount:
    storage, scale = tracker.storages[index], tracker.scales[index]
    if scale == CONSTANT:
        return Amount(constant=storage.size)
    if scale == CLIP:
        return Amount(per_clip=storage.size / clips)
    return Amount(per_frame=storage.size / storage.frames, frames=storage.frames_per_clip)


def _peaks(tracker: StepTracker, amounts: list[Amount], phase: str, chunk: int) -> set[int]:
    """Return the indices of the events that are a peak of the phase at some micro-batch size."""
    frames = sorted({amount.frames for amount in amounts})
    columns = {number: 2 + column for column, number in enumerate(frames)}
    changes = np.zeros((len(tracker.events), 2 + len(frames)))
    for row, event in enumerate(tracker.events):
        sign, amount = (1, amounts[event.storage]) if event.storage >= 0 else (-1, amounts[~event.storage])
        changes[row, 0], changes[row, 1] = sign * amount.constant, sign * amount.per_clip
        changes[row, columns[amount.frames]] += sign * amount.per_frame
    moments = np.array([row for row, event in enumerate(tracker.events) if event.phase == phase], dtype=int)
    if not len(moments):
        return set()
    live = np.cumsum(changes, axis=0)[moments]
    sizes = np.arange(1, MAX_MICRO_BATCH + 1)
    weights = np.stack(
        [np.ones_like(sizes), sizes, *(np.minimum(chunk, sizes * number) for number in frames)]
    )
    return set(moments[np.unique((live @ weights).argmax(axis=0))].tolist())


def _point(tracker: StepTracker, amounts: list[Amount], moment: int, live: Iterable[int]) -> MemoryPoint:
    parts: dict[str, list[Amount]] = {}
    for index in live:
        parts.setdefault(tracker.storages[index].part or "inputs, skips and loss", []).append(amounts[index])
    summed = {name: sum_amounts(group) for name, group in parts.items()}
    event = tracker.events[moment]
    return MemoryPoint(event.phase, event.module, sum_amounts(summed.values()), summed)
