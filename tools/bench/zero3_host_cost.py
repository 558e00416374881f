"""Time what ZeRO-3 costs the host of a rank, for any number of ranks: torch's fake process group."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.groups import ModelParallelUnit
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config

EXAMPLE = """example:
  python tools/bench/zero3_host_cost.py --ranks 2,64 --repeats 3

The network is the released UNet with few channels: 38 blocks that are gathered together, 1,332 parameters. A
micro-step is forward and backward of one clip on one CPU core, without the time of the fake all-gathers,
which copy a shard for each rank. What remains is the host's work on a real rank, and the arithmetic of the
tiny network, which a GPU takes over. Other programs disturb the medians of CPU milliseconds less than those
of wall time."""
CONFIG = UNetConfig(widths=(32, 64, 96, 96), context_width=32, head_width=16, scalar_width=32)
FRAMES, HEIGHT, WIDTH = 2, 8, 8
WARM_UP = 3
"""Micro-steps before the timed ones: DeepSpeed records the order of the blocks in the first two."""


@dataclass(frozen=True)
class Cost:
    """Medians of a micro-step, in seconds."""

    forward: float
    """CPU time, as `backward`."""
    backward: float
    wall: float


def main() -> None:
    arguments = parse_arguments()
    base: dict[bool, float] = {}
    print(
        "CPU ms of a micro-step (forward + backward), and its wall ms; ratio of CPU ms to the first row's\n"
    )
    print("| ranks | DeepSpeed's loops | ratio | one copy a parameter | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for num_ranks in arguments.ranks:
        cells = [str(num_ranks)]
        for fast in (False, True):
            # A process of its own: DeepSpeed and torch.distributed have global state.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                cost = pool.submit(measure, num_ranks, fast, arguments.repeats).result()
            forward, backward, wall = (round(1e3 * x) for x in (cost.forward, cost.backward, cost.wall))
            ratio = (cost.forward + cost.backward) / base.setdefault(fast, cost.forward + cost.backward)
            cells += [f"{forward + backward} ({forward} + {backward}), {wall}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


class TimedAllGather:
    """torch's all-gather, with the CPU and wall seconds that it took."""

    def __init__(self) -> None:
        self.original = dist.all_gather_into_tensor
        self.cpu = self.wall = 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        started = time.process_time(), time.perf_counter()
        handle = self.original(*arguments, **options)
        self.cpu += time.process_time() - started[0]
        self.wall += time.perf_counter() - started[1]
        return handle


def measure(num_ranks: int, fast: bool, repeats: int) -> Cost:
    """Time micro-steps of rank 0."""
    keep_freed_memory()
    torch.set_num_threads(1)
    # DeepSpeed reads them.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(num_ranks))
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    assert dist.group.WORLD is not None
    # DeepSpeed takes the function at its start.
    gathers = TimedAllGather()
    dist.all_gather_into_tensor = gathers
    engine = build_engine(ModelParallelUnit(dist.group.WORLD, dist.new_group([0])), fast)
    inputs = (
        torch.randn(1, FRAMES, CONFIG.in_channels, HEIGHT, WIDTH).bfloat16(),
        torch.randn(1),
        torch.randn(1, 1, CONFIG.context_width).bfloat16(),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )

    def clock() -> tuple[float, float]:
        return time.process_time() - gathers.cpu, time.perf_counter() - gathers.wall

    rows = []
    for _ in range(WARM_UP + repeats):
        times = [clock()]
        loss = engine(*inputs).float().square().mean()
        times.append(clock())
        engine.backward(loss)
        times.append(clock())
        engine.step({"all": 0.0}, float(engine.gradient_norm()))
        (start_cpu, start), (between, _), (end_cpu, end) = times
        rows.append((between - start_cpu, end_cpu - between, end - start))
    return Cost(*(statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True)))


def build_engine(mpu: ModelParallelUnit, fast: bool) -> Engine:
    """Build the network, sharded over the fake ranks."""
    config = deepspeed_config(ZeroConfig(), precision="bf16", gradient_clip=1.0)
    with Engine.sharded_init(config, mpu):
        unet = UNet(CONFIG)
    group = {"name": "all", "weight_decay": 0.01, "params": list(unet.parameters())}
    engine = Engine(unet, [group], config, mpu, leaves=unet.blocks().values(), fast_host_loops=fast)
    assert not engine.notes, engine.notes
    return engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=read_ranks, default=(2, 8, 64, 384, 1024), help="default 2,8,64,384,1024")
    add("--repeats", type=int, default=5, help="timed micro-steps; default 5")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def read_ranks(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    run_cli(main)
