"""Compare a training step under ZeRO-3 with DistributedDataParallel on the same ranks."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from cases import DTYPES, Case, Inputs, add_case_options, read_cases
from timed_network import synchronize
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.model.unet import UNet
from svd_ds.parallel import env as environment
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups
from svd_ds.parallel.process_group import leave_on_error, process_group
from svd_ds.parallel.recompute import POLICIES, apply_recompute
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config

EXAMPLE = """example:
  python tools/launch.py -n 2 --script tools/bench/zero3_overhead.py -- --size 128x192 --frames 8

A step is forward, backward, gradient clipping and AdamW, one clip a rank. DistributedDataParallel replicates
the network on every rank, with torch's fused AdamW, in the same precision. The two take turns; the ratio is
the median of ZeRO-3's time over DistributedDataParallel's, pair by pair, with the smallest and the
largest."""
GRADIENT_CLIP = 1.0
Step = Callable[[Inputs], None]


def main() -> None:
    keep_freed_memory()
    arguments = parse_arguments()
    cases = read_cases(arguments, ("pairs",))
    zero = ZeroConfig(
        persistence_threshold=arguments.persistence,
        prefetch_bucket=arguments.prefetch,
        max_live=arguments.max_live,
        max_reuse_distance=arguments.reuse,
    )
    env = Env.read()
    with leave_on_error(env), process_group(env):
        for case in cases:
            pairs = compare(case, zero, arguments, env)
            if env.rank == 0:
                report(case, env, pairs)


def compare(case: Case, zero: ZeroConfig, arguments: argparse.Namespace, env: Env) -> list[tuple[float, ...]]:
    """Time pairs of steps, sharded and replicated, in seconds."""
    steps = (sharded(case, zero, arguments.recompute, env), replicated(case, arguments.recompute, env))
    inputs = case.inputs(env.device)
    for step in steps:
        timed(step, inputs)  # the first is slower: allocation, choice of kernels
    return [tuple(timed(step, inputs) for step in steps) for _ in range(arguments.pairs)]


def sharded(case: Case, zero: ZeroConfig, recompute: str, env: Env) -> Step:
    """Build the step under ZeRO-3."""
    mpu = create_groups(ParallelDims(env.world))
    config = deepspeed_config(zero, precision=case.dtype, gradient_clip=GRADIENT_CLIP)
    with Engine.sharded_init(config, mpu):
        unet = UNet(case.config)
    apply_recompute(unet, unet.blocks(), recompute)
    group = {"name": "all", "weight_decay": 0.01, "params": list(unet.parameters())}
    engine = Engine(unet, [group], config, mpu, leaves=unet.blocks().values())

    def step(inputs: Inputs) -> None:
        engine.backward(engine(*inputs).float().square().mean())
        engine.step({"all": 1e-4})

    return step


def replicated(case: Case, recompute: str, env: Env) -> Step:
    """Build the step under DistributedDataParallel."""
    unet = UNet(case.config).to(env.device, DTYPES[case.dtype])
    apply_recompute(unet, unet.blocks(), recompute)
    # With one token queries and keys have no gradient: without static_graph torch would wait for it.
    network: nn.Module = DistributedDataParallel(unet, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(inputs: Inputs) -> None:
        network(*inputs).float().square().mean().backward()
        nn.utils.clip_grad_norm_(unet.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step, inputs: Inputs) -> float:
    """Time a step of all ranks, in seconds."""
    environment.barrier()
    synchronize(inputs[0].device)
    started = time.perf_counter()
    step(inputs)
    synchronize(inputs[0].device)
    environment.barrier()
    return time.perf_counter() - started


def report(case: Case, env: Env, pairs: list[tuple[float, ...]]) -> None:
    """Print a row: ranks, widths, clip, dtype, ms of ZeRO-3, ms of DistributedDataParallel, ratio."""
    zero, replicas = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratios = [zero_s / replica_s for zero_s, replica_s in pairs]
    print(
        f"| {env.world} x {env.device.type} | {','.join(map(str, case.widths))} | {case.clip} | {case.dtype} "
        f"| {1e3 * zero:.0f} | {1e3 * replicas:.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, size="128x192", frames=8, tokens="1", dtype="fp32")
    add = parser.add_argument
    add("--recompute", default="blocks", choices=POLICIES, help="policy of both; default blocks")
    add("--persistence", type=int, default=ZeroConfig.persistence_threshold, help="see parallel/zero.py")
    add("--prefetch", type=int, default=ZeroConfig.prefetch_bucket, help="see parallel/zero.py")
    add("--max-live", type=int, help="see parallel/zero.py")
    add("--reuse", type=int, default=ZeroConfig.max_reuse_distance, help="see parallel/zero.py")
    add("--pairs", type=int, default=7, help="timed pairs of steps; default 7")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
