"""StepProfile of a request: runs the step on fake tensors, and sums up what the tracker saw."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import torch
from torch import nn

from svd_ds.config import FIELD_ALIASES, RunConfig
from svd_ds.plan.fake_step import FakeStep
from svd_ds.plan.step_memory import kept_bytes, memory_points
from svd_ds.plan.step_profile import PHASES, Operation, PhaseCost, ProfileRequest, StepProfile
from svd_ds.plan.tracker import StepTracker


def profile(request: ProfileRequest, steps: dict[str, FakeStep], exact: bool) -> StepProfile:
    """Profile the step of a request.

    Args:
        steps: steps of earlier requests, to which this one is added. A further recompute policy does not run
            the encoders again.
        exact: False if there are no fake CUDA devices.
    """
    key = json.dumps([request.config, request.precision, request.device, request.clips], sort_keys=True)
    if key not in steps:
        device = torch.device("cuda", 0) if request.device == "cuda" and exact else torch.device("cpu")
        steps[key] = FakeStep(config_from_dict(request.config), device, request.precision)
    step = steps[key]
    run = step.run(request.policy, request.clips)
    tracker, encoders = run.tracker, run.encoders
    chunk, clips = step.config.frozen.chunk, request.clips
    points = memory_points(tracker, clips, chunk)
    phases = {phase: _phase_cost(tracker, phase, clips) for phase in PHASES}
    if encoders is not tracker:
        own = tuple(point for point in points if point.phase != "encoders")
        points = (*(p for p in memory_points(encoders, clips, chunk) if p.phase == "encoders"), *own)
        phases["encoders"] = _phase_cost(encoders, "encoders", clips)
    parameters = dict(step.network.named_parameters())
    waits = [place for seen in (encoders, tracker) for place in (*seen.host_reads, *seen.blocking_copies)]
    discriminator = getattr(step.task.objective, "discriminator", None)
    return StepProfile(
        policy=request.policy,
        parameters=_numel(step.network),
        trained_parameters=sum(parameters[name].numel() for name in step.trained),
        tensors=len(parameters),
        trained_tensors=len(step.trained),
        blocks={name: numel for name, (_, numel) in step.engine.units.items()},
        compute_bytes=step.dtype.itemsize,
        frozen_bytes=sum(map(_bytes, step.frozen_networks)),
        # float32 weights, gradients and two moments
        extra_bytes=0 if discriminator is None else 4 * 4 * _numel(discriminator.network),
        chunk=chunk,
        kept=kept_bytes(run, clips),
        points=points,
        phases=phases,
        host_reads=tuple(dict.fromkeys(waits)),
        device_errors=tuple(dict.fromkeys((*encoders.device_errors, *tracker.device_errors))),
        exact=exact,
    )


def config_from_dict(settings: dict[str, Any]) -> RunConfig:
    """Restore a config from `RunConfig.as_dict`."""
    names = {spelling: name for name, spelling in FIELD_ALIASES.items()}

    def build(kind: Any, values: Any) -> Any:
        parts = {}
        for entry in dataclasses.fields(kind):
            factory = entry.default_factory
            default = factory() if factory is not dataclasses.MISSING else None
            value = values[entry.name]
            parts[entry.name] = build(type(default), value) if dataclasses.is_dataclass(default) else value
        return kind(**parts)

    init = {names.get(key, key): value for key, value in settings["init"].items()}
    return build(RunConfig, settings | {"init": init})


def _phase_cost(tracker: StepTracker, phase: str, clips: int) -> PhaseCost:
    costs = {cost: count for cost, count in tracker.costs.items() if cost.phase == phase and count}
    rows: Counter[tuple[str, float, float, float, int]] = Counter()
    for cost, count in costs.items():
        units = cost.frames or clips
        rows[
            cost.kind, cost.flops / units, cost.bytes / units, cost.constant_bytes, cost.frames_per_clip
        ] += count
    operations = tuple(
        Operation(kind, count, flops, moved, constant, frames)
        for (kind, flops, moved, constant, frames), count in rows.items()
    )
    flops: dict[str, float] = {}
    for op in operations:
        flops[op.kind] = flops.get(op.kind, 0.0) + op.count * op.flops * (op.frames or 1)
    return PhaseCost(
        operations=operations,
        launches=tracker.launches[phase],
        flops=flops,
        clip_bytes=sum(op.count * op.bytes * (op.frames or 1) for op in operations),
        constant_bytes=sum(op.count * op.constant_bytes for op in operations),
    )


def _numel(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
