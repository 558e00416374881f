"""Ranks that add up numbers under a watchdog, until rank 1 hangs in the third step.

hanging_ranks.py RUN_FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from svd_ds.jobs.rank_session import RankSession
from svd_ds.jobs.watchdog import WatchdogConfig
from svd_ds.parallel.env import Env, init
from svd_ds.run_folder import RunFolder


def wait_for_a_file_system() -> None:
    time.sleep(1000)


def main(folder: str) -> None:
    env = Env.read()
    init(env)
    watchdog = WatchdogConfig(minutes=0.02, first_minutes=0.1)
    with RankSession(RunFolder(Path(folder)), env, watchdog) as session:
        for step in range(1000):
            if step == 2 and env.rank == 1:
                wait_for_a_file_system()
            dist.all_reduce(torch.ones(1))
            session.watchdog.heartbeat()


if __name__ == "__main__":
    main(sys.argv[1])
