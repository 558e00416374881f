"""Start several ranks of the training, or of another program, on this machine."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import torch.distributed as dist

from svd_ds.cli import EXIT_PEER_FAILED, print_error, run_cli
from svd_ds.parallel.devices import check_gpus_are_usable, num_gpus

GRACE_S = 5.0
"""Seconds that the other ranks get to report their own errors once a rank has failed."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: tools/launch.py -n 2 -- +experiment=noise_schedule run.steps=100",
    )
    gpus = num_gpus()
    parser.add_argument(
        "-n", type=int, default=gpus or 2, help="ranks (default: one per GPU, or 2 without GPUs)"
    )
    parser.add_argument(
        "--script", help="run this Python file on each rank instead of `python -m svd_ds.train`"
    )
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="passed to each rank unchanged")
    options = parser.parse_args()
    if options.n < 1:
        raise ValueError(f"-n is {options.n}: it must be at least 1")
    check_gpus_are_usable()
    program = [options.script] if options.script else ["-m", "svd_ds.train"]
    sys.exit(launch([sys.executable, *program, *options.arguments], options.n))


def launch(command: list[str], num_ranks: int) -> int:
    """Run `command` as `num_ranks` ranks and wait for them.

    Signals are forwarded to every rank. When a rank fails, the others are killed after GRACE_S. No rank
    outlives this process.

    Returns:
        Exit code of the first rank that failed by itself, or 0.
    """
    # With the store in this process, not in rank 0, no other program can take its port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [start(command, rank, num_ranks, store.port) for rank in range(num_ranks)]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    return wait(ranks)


def start(command: list[str], rank: int, num_ranks: int, port: int) -> subprocess.Popen[bytes]:
    """Start one rank. Rank 0 writes to the terminal; of the other ranks only stderr is shown."""
    launcher = os.getpid()

    def die_with_launcher() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    return subprocess.Popen(
        command,
        env=rank_environment(rank, num_ranks, port),
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        # A process group per rank: Ctrl-C reaches it only through us, and it is killed with its workers.
        process_group=0,
        preexec_fn=die_with_launcher,
    )


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank; the TCPStore of the launcher listens on `port`."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torchrun's variable for a store that exists already: rank 0 does not open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait until every rank has ended; kill the others once one has failed. Return the exit code."""
    running, failures, deadline = list(ranks), [], float("inf")
    while running:
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            failures += [process.returncode] if process.returncode else []
            if process.returncode < 0:
                # A rank reports its other failures itself.
                killer = signal.Signals(-process.returncode).name
                print_error(f"rank {ranks.index(process)} was killed by {killer}")
        if failures and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            break
        time.sleep(0.05)
    # The rank that failed first may be slower to end than one that lost its peer.
    failure = next((code for code in failures if code != EXIT_PEER_FAILED), failures[0] if failures else 0)
    # The convention of shells: 128 plus the number of the signal.
    return failure if failure >= 0 else 128 - failure


if __name__ == "__main__":
    run_cli(main)
