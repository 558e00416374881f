"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from svd_ds.parallel.recompute import POLICIES
from svd_ds.plan.fit import DOES_NOT_FIT, FITS, TIGHT, Option, best_option
from svd_ds.plan.hardware import CALIBRATIONS, GB, GIB, HOST_LAWS, LAUNCH_S, NODE_NETWORK_SHARE
from svd_ds.plan.memory import ASSUMPTIONS
from svd_ds.plan.planner import Plan, ShapePlan
from svd_ds.plan.speed import Cost, Speed

MARKS = {FITS: "*", TIGHT: "~"}


def as_text(plan: Plan) -> str:
    """Return the plan for a terminal."""
    lines = [_headline(plan)]
    for shape in plan.shapes:
        lines += ["", *_memory_lines(plan, shape)]
    if plan.options:
        lines += ["", *_table(plan)]
    for shape in plan.shapes:
        lines += ["", *_speed_lines(plan, shape)]
    lines += ["", *_cost_lines(plan), "", "assumptions", *(f"  {line}" for line in assumptions(plan))]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as one JSON document; memory in bytes, times in seconds."""
    cluster = plan.cluster
    best = best_option(plan.options)
    return {
        "name": plan.config.name,
        "cluster": {
            "gpu": cluster.gpu.name,
            "memory": cluster.gpu.memory_bytes,
            "gpus": cluster.ranks,
            "gpus_per_node": cluster.gpus_per_node,
            "interconnect_gb_s": cluster.node_network / GB,
        },
        "parameters": plan.profile.parameters,
        "trained_parameters": plan.profile.trained_parameters,
        "shapes": [
            {"shape": str(shape.shape), **_option(shape.option), "with_latent_cache": _speed(shape.cached)}
            for shape in plan.shapes
        ],
        "cost": asdict(plan.cost),
        "cost_with_latent_cache": asdict(plan.cached_cost),
        "options": [_short(option) for option in plan.options],
        "best": best.settings if best else None,
        "assumptions": assumptions(plan),
    }


def _option(option: Option) -> dict[str, Any]:
    memory = option.memory
    return {
        "micro": option.micro,
        "recompute": option.recompute,
        "offload_optimizer": option.offload,
        "verdict": option.verdict,
        "memory": {
            "tensors": memory.allocated,
            "total": memory.total,
            "peak": memory.where,
            "kept": memory.kept,
            "parts": memory.parts,
            "allowance": memory.allowance,
            "host_of_a_node": memory.host,
        },
        "speed": _speed(option.speed),
    }


def _short(option: Option) -> dict[str, Any]:
    return {
        "settings": option.settings,
        "verdict": option.verdict,
        "tensors": option.memory.allocated,
        "total": option.memory.total,
        "clips_per_s": option.speed.clips_per_s,
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return asdict(speed) | {"bound": speed.bound}


def _headline(plan: Plan) -> str:
    config, cluster, profile = plan.config, plan.cluster, plan.profile
    precision = "bf16" if profile.compute_bytes == 2 else "fp32"
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    return (
        f"{config.name}: {' or '.join(map(str, config.data.shapes))}, batch {config.batch.size} on "
        f"{cluster.ranks} x {cluster.gpu.name} ({nodes}), {precision}; {profile.parameters:,} parameters, "
        f"{profile.trained_parameters:,} trained"
    )


def _memory_lines(plan: Plan, shape: ShapePlan) -> list[str]:
    memory, gpu = shape.option.memory, plan.cluster.gpu
    rows = [(name, size) for name, size in memory.parts.items() if size]
    width = max(len(name) for name, _ in rows)
    lines = [f"memory of a GPU, {shape.shape} with {shape.option.settings}, GiB"]
    lines += [f"  {name:{width}}{size / GIB:8.2f}" for name, size in rows]
    lines += [f"  {'= tensors':{width}}{memory.allocated / GIB:8.2f}  at the peak, in {memory.where}"]
    lines += [
        f"  {name:{width}}{size / GIB:8.2f}  assumed" for name, size in memory.allowance.items() if size
    ]
    total = f"of {gpu.memory_gib:g}: {shape.option.verdict}"
    lines += [f"  {'= total':{width}}{memory.total / GIB:8.2f}  {total}"]
    lines += [f"  kept from forward to backward: {memory.kept / GIB:.2f}"]
    if memory.host:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.host.items())
        lines += [f"  host memory of a node: {sum(memory.host.values()) / GIB:.1f} ({parts})"]
    return lines


def _table(plan: Plan) -> list[str]:
    """Lay out total memory and speed over micro-batch and recompute policy. Offloading is shown if it is
    configured, or if more fits with it."""
    lines = [
        "GiB and clips/s by batch.micro and recompute: * fits, ~ without the allowance only, x does not fit"
    ]
    fitting = [
        {(o.micro, o.recompute) for o in plan.options if o.offload is offload and o.verdict == FITS}
        for offload in (False, True)
    ]
    lines += _table_rows(plan, offload=False)
    if fitting[1] - fitting[0] or plan.config.parallel.offload_optimizer:
        lines += ["with parallel.offload_optimizer=true", *_table_rows(plan, offload=True)]
    best = best_option(plan.options)
    return [*lines, f"best that fits: {best.settings}" if best else "none fits"]


def _table_rows(plan: Plan, offload: bool) -> list[str]:
    rows = {(o.micro, o.recompute): o for o in plan.options if o.offload is offload}
    policies = [policy for policy in POLICIES if any(recompute == policy for _, recompute in rows)]
    lines = [f"  {'micro':>6}" + "".join(f"{policy:>18}" for policy in policies)]
    for micro in sorted({micro for micro, _ in rows}):
        options = [rows[micro, policy] for policy in policies]
        if micro > 1 and all(option.verdict == DOES_NOT_FIT for option in options):
            return [*lines, f"  {micro:6}  and more: none fits"]
        lines += [f"  {micro:6}" + "".join(f"{_cell(option):>18}" for option in options)]
    return lines


def _cell(option: Option) -> str:
    total = f"{option.memory.total / GIB:.1f}"
    if option.verdict == DOES_NOT_FIT:
        return f"{total} x"
    return f"{total} {_three_digits(option.speed.clips_per_s)}/s {MARKS[option.verdict]}"


def _three_digits(value: float) -> str:
    """Write a number with at least three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed_lines(plan: Plan, shape: ShapePlan) -> list[str]:
    speed, traffic = shape.option.speed, shape.option.speed.traffic
    mfu = f", MFU {speed.mfu:.1%}" if speed.mfu is not None else ""
    between = f"; {traffic.between_nodes / GB:.1f} GB into each node" if traffic.between_nodes else ""
    micro_steps = f"{speed.num_micro_batches} micro-step{'s' if speed.num_micro_batches > 1 else ''}"
    lines = [
        f"step of {shape.shape}: {speed.step_s:.2f} s, {_three_digits(speed.clips_per_s)} clips/s{mfu}, "
        f"bound by the {speed.bound}",
        f"  {micro_steps} of {max(speed.gpu_s, speed.host_s):.3f} s, optimiser {speed.optimizer_s:.3f} s",
        f"  GPU: encoders {speed.encoders_s:.3f}, forward {speed.forward_s:.3f}, backward "
        f"{speed.backward_s:.3f}; with communication overlapped {speed.gpu_s:.3f}, not overlapped "
        f"{speed.not_overlapped_s:.3f}",
        f"  communication: all-gather {traffic.gathered / GB:.2f} GB, reduce-scatter "
        f"{traffic.reduced / GB:.2f} GB per rank{between}; forward {traffic.forward_s:.3f} s, backward "
        f"{traffic.backward_s:.3f} s",
        f"  host: {speed.host_s:.3f} s",
    ]
    if shape.cached != speed:
        clips_per_s = f"{_three_digits(shape.cached.clips_per_s)} clips/s"
        lines += [f"  with the latent cache (tools/encode.py): {shape.cached.step_s:.2f} s, {clips_per_s}"]
    return lines


def _cost_lines(plan: Plan) -> list[str]:
    steps = plan.config.run.steps
    lines = [
        f"run of {steps:,} steps, {steps * plan.config.batch.size:,} clips: {_cost(plan.cost)}",
    ]
    if plan.cached_cost != plan.cost:
        lines += [f"  with the latent cache: {_cost(plan.cached_cost)}"]
    return lines


def _cost(cost: Cost) -> str:
    money = f", {cost.money:,.0f} USD" if cost.money is not None else ""
    return f"{cost.days:,.2f} days, {cost.gpu_hours:,.0f} GPU hours{money}"


def assumptions(plan: Plan) -> list[str]:
    """Return every assumption of the plan, with its source."""
    gpu, cluster = plan.cluster.gpu, plan.cluster
    shares, law = gpu.shares, HOST_LAWS[plan.config.parallel.fast_host_loops]
    calibrations = [c for c in CALIBRATIONS if c.gpu == gpu.name]
    lines = [
        f"{gpu.name}: {gpu.bf16_flops / 1e12:g} TFLOP/s in bf16, {gpu.tf32_flops / 1e12:g} in TF32 "
        f"(convolutions in fp32), {gpu.fp32_flops / 1e12:g} in fp32, {gpu.bandwidth / GB:g} GB/s, "
        f"{gpu.memory_gib:g} GiB ({gpu.source})",
        f"shares of the peak, assumed: products {shares.matmul:.0%}, convolutions {shares.conv:.0%}, "
        f"attention {shares.attention:.0%}, bandwidth {shares.bandwidth:.0%}; at least {LAUNCH_S * 1e6:g} us "
        "an operation",
        *(f"calibrated by {c.source}" for c in calibrations),
        *(() if calibrations else ["not calibrated: no step was measured on it, so times are lower bounds"]),
        f"all-gather and reduce-scatter within a node at {gpu.link / GB:g} GB/s per GPU, between nodes at "
        f"{NODE_NETWORK_SHARE:.0%} of {cluster.node_network / GB:g} GB/s per node (--interconnect)",
        f"host: ({law.base_s:g} + {law.per_rank_s:g} x ranks) s a micro-step and {law.tensors} tensors "
        f"({law.source}); no launch of a kernel",
        *ASSUMPTIONS,
        "with the latent cache no frame is encoded (the given frames, which are, do not count)",
        "not counted: checkpoints, evaluations, previews, restarts, waits for data",
    ]
    if not plan.profile.exact:
        lines.append("no C++ compiler: layouts of tensors are a CPU's, so the memory is approximate")
    if len(plan.shapes) > 1:
        lines.append("the buckets have equally many steps")
    return lines
