"""Preflight check of a job's nodes: their GPUs, their disks, and the network between them.

    srun --ntasks-per-node=1 python -m svd_ds.jobs.preflight alone RUN_FOLDER RESULTS --gpus 8

This command runs on each node, and a second one with `together` in place of `alone`. `failing_nodes` starts
both from the batch host and finds the nodes to blame. Each node writes its result to the file RESULTS/NODE:
"fit", or what is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from svd_ds.cli import print_line
from svd_ds.fsync_io import fsync_path, name_errors, write_text
from svd_ds.parallel import env as environment
from svd_ds.parallel.devices import UNUSABLE, check_gpus_are_usable, is_mismatch, num_gpus
from svd_ds.parallel.env import Env

FIT = "fit"
CHECK_TIMEOUT_S = 300.0
"""Seconds within which all nodes must answer; this includes the start of Python from a shared disk."""
RENDEZVOUS_TIMEOUT_S = 90.0
"""Seconds within which the nodes must find each other."""
KILL_AFTER_S = 10.0
"""Seconds between SIGTERM, at CHECK_TIMEOUT_S, and SIGKILL of a step that has not ended."""


class Job(Protocol):
    """The part of svd_ds.jobs.slurm.Job that the checks need."""

    @property
    def id(self) -> str: ...

    @property
    def nodes(self) -> tuple[str, ...]: ...

    @property
    def gpus(self) -> int: ...

    def start_step(
        self, command: Sequence[str], *options: str, **variables: str
    ) -> subprocess.Popen[bytes]: ...

    def requeue(self, exclude: Sequence[str] = ()) -> None: ...


def failing_nodes(job: Job, folder: Path, together: bool = True) -> dict[str, str]:
    """Check the nodes of a job, each alone and then all together.

    Args:
        folder: run folder, in which each node writes its result.
        together: also check that the nodes reach each other.

    Returns:
        Node -> why it should not be used; all nodes if no single one is to blame.

    Raises:
        ValueError: torch cannot use the GPUs of any node: a user's mistake, which other nodes would repeat.
    """
    # A node that fails must not end the step for those that are slower to answer.
    results = _run_check(job, "alone", [job.nodes], folder, "--kill-on-bad-exit=0")
    faults = {node: result for node, result in results.items() if result != FIT}
    _check_torch_fits(faults, len(job.nodes))
    if faults or not together or len(job.nodes) == 1:
        return faults
    results = _run_check(job, "together", [job.nodes], folder)
    if all(result == FIT for result in results.values()):
        return {}
    return _unreachable_nodes(job, folder) or dict.fromkeys(
        job.nodes, "reaches a neighbour, but the all-reduce over all nodes fails"
    )


def _check_torch_fits(faults: dict[str, str], num_nodes: int) -> None:
    """Raise ValueError if no node has GPUs that the installed torch can use."""
    if len(faults) < num_nodes or not all(UNUSABLE in fault for fault in faults.values()):
        return
    fault = next(iter(faults.values()))
    # The driver of a single node may have failed there alone.
    if num_nodes > 1 or is_mismatch(fault):
        raise ValueError(f"{fault} ({', '.join(faults)})")


def exclude_nodes(job: Job, faults: dict[str, str]) -> None:
    """Requeue the job, excluding nodes.

    If all of several nodes fail, the cause is elsewhere, and no node is excluded.

    Args:
        faults: node -> why it should not be used.
    """
    if len(faults) == len(job.nodes) > 1:
        node, fault = next(iter(faults.items()))
        print_line(f"job {job.id} is requeued: all its nodes fail, {node} {fault}")
        job.requeue()
        return
    reasons = "; ".join(f"{node} {fault}" for node, fault in faults.items())
    print_line(f"job {job.id} is requeued without {', '.join(faults)}: {reasons}")
    job.requeue(exclude=list(faults))


def _unreachable_nodes(job: Job, folder: Path) -> dict[str, str]:
    """Find the nodes to blame if each is fit alone, but the check of all nodes together fails.

    They are the nodes that reach neither of their neighbours in a ring. Of two nodes it is the second,
    because the first is the batch host, which Slurm reaches.
    """
    nodes = job.nodes
    if len(nodes) == 2:
        return {nodes[1]: f"does not reach {nodes[0]}"}
    ring = [(node, nodes[(i + 1) % len(nodes)]) for i, node in enumerate(nodes)]
    reached: set[str] = set()
    # No node is in two pairs of a round; in a ring of odd length the last pair is a round by itself.
    rounds = [ring[0 : len(ring) - 1 : 2], ring[1::2], ring[len(ring) - 1 :: 2] if len(ring) % 2 else []]
    for pairs in filter(None, rounds):
        results = _run_check(job, "together", pairs, folder)
        reached |= {node for node, result in results.items() if result == FIT}
    return {node: "reaches none of its neighbours" for node in nodes if node not in reached}


def _run_check(
    job: Job, check: str, groups: Sequence[Sequence[str]], folder: Path, *options: str
) -> dict[str, str]:
    """Run a check on each group of nodes, all groups at the same time; return the result of each node."""
    results = folder / "logs" / "preflight"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    command = [sys.executable, "-m", "svd_ds.jobs.preflight", check, str(folder), str(results)]
    command += ["--gpus", str(job.gpus)]
    steps = [
        job.start_step(
            command,
            f"--nodes={len(group)}",
            f"--ntasks={len(group)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(group)}",
            # srun would read a % in the folder's name as a pattern.
            f"--error={str(folder).replace('%', '%%')}/logs/preflight.log",
            *options,
            MASTER_ADDR=group[0],
        )
        for group in groups
    ]
    _wait(steps)
    no_result = f"does not answer, or cannot write to {results}"
    return {
        node: ((results / node).read_text() if (results / node).exists() else "") or no_result
        for group in groups
        for node in group
    }


def _wait(steps: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all steps have ended, by themselves or at their time limit."""
    for limit_s, end in (
        (CHECK_TIMEOUT_S, subprocess.Popen.terminate),
        (KILL_AFTER_S, subprocess.Popen.kill),
    ):
        deadline = time.monotonic() + limit_s
        for step in steps:
            try:
                step.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                end(step)
    for step in steps:
        step.wait()


def check_node(folder: Path, gpus: int) -> None:
    """Check the GPUs of this machine, the run folder and the temporary folder.

    Args:
        gpus: number of GPUs that the machine should have; with 0 the CPU is checked.

    Raises:
        ValueError: torch's build, or the driver's version, does not allow to use the GPUs.
        OSError: a GPU is missing or multiplies wrongly, or a folder cannot be written.
        RuntimeError: torch raises an error on a GPU.
    """
    if gpus:
        check_gpus_are_usable()
        if (found := num_gpus()) < gpus:
            raise OSError(f"sees {found} GPUs of its {gpus}")
    for device in [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]:
        square = torch.ones(1024, 1024, device=device)
        if not bool(((square @ square) == 1024).all()):
            raise OSError(f"multiplies wrongly on {device}")
    for path in (folder, Path(tempfile.gettempdir())):
        with name_errors(path), tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(bytes(1 << 20))
            file.flush()
            fsync_path(Path(file.name))


def check_interconnect(env: Env) -> None:
    """All-reduce over the nodes of the step.

    Raises:
        RuntimeError: the nodes do not reach each other, or the sum is wrong.
    """
    environment.init(env, timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S))
    ones = torch.ones(1 << 20, device=env.device)
    dist.all_reduce(ones)
    if not bool((ones == env.world).all()):
        raise RuntimeError(f"the sum of {env.world} ones came out as {ones.mean().item()}")
    environment.shutdown()


def main() -> None:
    """Run one check on this node and write its result.

    Exit code: 0 if the node is fit, 1 if not.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=("alone", "together"))
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("results", type=Path, help="folder in which each node writes its result")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node should have")
    options = parser.parse_args()
    fault = None
    try:
        if options.check == "alone":
            check_node(options.folder, options.gpus)
        else:
            check_interconnect(Env.read())
    except (ValueError, OSError, RuntimeError) as error:
        fault = " ".join(str(error).split())
    write_text(options.results / environment.host(), fault or FIT)
    sys.exit(1 if fault else 0)


if __name__ == "__main__":
    main()
