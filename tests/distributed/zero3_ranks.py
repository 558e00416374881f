"""The program that each rank of test_zero3.py runs.

    zero3_ranks.py RESULTS CHECK ...

Every rank runs the checks named and writes RESULTS/rank-R.json: check -> traceback or null.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from svd_ds.parallel.env import Env, init, shutdown
from svd_ds.parallel.groups import ParallelDims, create_groups
from tests.distributed import zero3_checkpoints, zero3_evaluation, zero3_training, zero3_weights
from tests.distributed.zero3_harness import Ranks

CHECKS = {
    name.removeprefix("check_"): function
    for module in (zero3_training, zero3_checkpoints, zero3_weights, zero3_evaluation)
    for name, function in vars(module).items()
    if name.startswith("check_")
}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    env = Env.read()
    init(env, timeout=timedelta(seconds=60))
    ranks = Ranks(env, create_groups(ParallelDims(env.world)), folder)
    results = {}
    for name in names:
        torch.manual_seed(env.rank)
        try:
            CHECKS[name](ranks)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    Path(folder, f"rank-{env.rank}.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
