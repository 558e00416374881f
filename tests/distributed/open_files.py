"""The program that each rank of test_startup.py runs.

    open_files.py RESULTS

After a step of an engine every rank writes RESULTS/rank-R.json: the number of the sockets and other files
that it has opened, and of its process groups.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env, init, shutdown, start_time
from svd_ds.parallel.groups import ParallelDims, create_groups
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    env, before = Env.read(), num_open_files()
    start_time(env)
    init(env)
    mpu = create_groups(ParallelDims(env.world))
    config = deepspeed_config(ZeroConfig(), precision="fp32", gradient_clip=1.0)
    with Engine.sharded_init(config, mpu):
        module = nn.Linear(4, 4)
    group = {"name": "all", "weight_decay": 0.0, "params": list(module.parameters())}
    engine = Engine(module, [group], config, mpu)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.gradient_norm()
    engine.step({"all": 1e-3})
    dist.barrier()
    counts = {"files": num_open_files() - before, "groups": len(dist.distributed_c10d._world.pg_map)}
    Path(folder, f"rank-{env.rank}.json").write_text(json.dumps(counts))
    dist.barrier()
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
