"""Preflight check of a job's nodes, from the batch host: which nodes should the job not use, and why?

node_checks.py has the checks that run on the nodes: each node alone, then all nodes together.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from svd_ds.cli import print_line
from svd_ds.jobs.node_checks import UNREACHABLE_NAME, TaskResult, ring_rounds
from svd_ds.model.ops.trial import KernelSettings
from svd_ds.parallel.devices import UNUSABLE, is_mismatch
from svd_ds.parallel.env import restart_id

CHECK_TIMEOUT_S = 300.0
"""Seconds within which all nodes must answer; this includes the start of Python from a shared disk."""
SLOW = 0.5
"""A GPU whose bandwidth to other nodes is below this fraction of the others' median is slow."""
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


def failing_nodes(
    job: Job, folder: Path, together: bool = True, kernels: KernelSettings | None = None
) -> dict[str, str]:
    """Check the nodes of a job, each alone and then all together.

    Args:
        folder: run folder, in which each node writes its result.
        together: also check that the nodes reach each other.
        kernels: kernels of the network, which are tried on each node; None tries none.

    Returns:
        Node -> why it should not be used; all nodes if no single one is to blame.

    Raises:
        ValueError: torch cannot use the GPUs of any node: a user's mistake, which other nodes would repeat.
    """
    trial = [] if kernels is None else ["--kernels", json.dumps(asdict(kernels))]
    results = _run_check(job, "alone", [job.nodes], folder, trial)
    _print_kernel_faults(results)
    faults = _faults(results)
    _check_torch_fits(faults, len(job.nodes))
    if faults or not together or len(job.nodes) == 1:
        return faults
    results = _run_check(job, "together", [job.nodes], folder)
    faults = _faults(results)
    if not faults:
        return _slow_nodes(job, {node: result.bandwidths for node, result in results.items()})
    if unnamed := {node: fault for node, fault in faults.items() if UNREACHABLE_NAME in fault}:
        if len(unnamed) == len(job.nodes):
            raise ValueError(
                f"{job.nodes[0]} {unnamed[job.nodes[0]]}; so do all {len(unnamed)} nodes of the job"
            )
        return unnamed
    return _unreachable_nodes(job, folder) or dict.fromkeys(
        job.nodes, "reaches a neighbour, but the check of all nodes together fails"
    )


def _print_kernel_faults(results: Mapping[str, NodeResult]) -> None:
    """Name the nodes on which kernels cannot be used, a line for each fault.

    The nodes are fit: a run takes other kernels on all of them, or refuses the one that was chosen by name.
    """
    nodes: dict[tuple[str, str], list[str]] = {}
    for node, result in results.items():
        by_fault: dict[str, list[str]] = {}
        for kernel, fault in result.kernel_faults.items():
            by_fault.setdefault(fault, []).append(kernel)
        for fault, kernels in by_fault.items():
            nodes.setdefault((" and ".join(kernels), fault), []).append(node)
    for (kernel, fault), names in nodes.items():
        print_line(f"warning: {kernel} cannot be used on {', '.join(names)}: {fault}")


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
    reached: set[str] = set()
    for pairs in ring_rounds(nodes):
        results = _run_check(job, "together", pairs, folder)
        reached |= results.keys() - _faults(results).keys()
    return {node: "reaches none of its neighbours" for node in nodes if node not in reached}


def _slow_nodes(job: Job, bandwidths: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Print the measured bandwidth between nodes, and find nodes with a slow GPU.

    A few slow nodes are excluded when the job first starts, and only named when it restarts: a run at a lower
    speed is better than none. Of two nodes none is known to be the slow one, and where half of the nodes are
    slow the cause is elsewhere: they are only named, too.
    """
    print_line(describe_bandwidth(bandwidths))
    slow = slow_rails(bandwidths) if job.gpus else {}
    if len(job.nodes) > 2 and len(slow) < len(job.nodes) / 2 and restart_id()[1] == 0:
        return slow
    for node, fault in slow.items():
        print_line(f"warning: {node} {fault}")
    return {}


def describe_bandwidth(bandwidths: Mapping[str, Sequence[float]]) -> str:
    """Describe the bandwidth between nodes in one line.

    Args:
        bandwidths: node -> GB/s of each of its ranks.
    """
    least, node, rank = min((gb, node, i) for node, gbs in bandwidths.items() for i, gb in enumerate(gbs))
    median = statistics.median(gb for gbs in bandwidths.values() for gb in gbs)
    per_node = statistics.median(map(sum, bandwidths.values()))
    return (
        f"bandwidth between nodes, in each direction: {per_node:.3g} GB/s a node and {median:.3g} GB/s "
        f"a rank (medians); least {least:.3g} GB/s, rank {rank} of {node}"
    )


def slow_rails(bandwidths: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Find the nodes with a GPU that is below SLOW of the median of all other GPUs.

    Args:
        bandwidths: node -> GB/s of each of its GPUs.

    Returns:
        Node -> its slowest GPU, in words.
    """
    rails = [(gb, node, gpu) for node, gbs in bandwidths.items() for gpu, gb in enumerate(gbs)]
    slow = {}
    for gb, node, gpu in sorted(rails, reverse=True):
        median = statistics.median(other[0] for other in rails if other != (gb, node, gpu))
        if gb < SLOW * median:
            slow[node] = (
                f"has a slow network: GPU {gpu} reaches {gb:.3g} GB/s to another node, "
                f"the median of the others is {median:.3g} GB/s"
            )
    return slow


@dataclass(frozen=True)
class NodeResult:
    """Result of a check on one node."""

    fault: str | None
    """The first fault among its tasks; None if all of them are fit."""
    bandwidths: tuple[float, ...]
    """Bandwidth of each task to other nodes in GB/s; empty if it was not measured."""
    kernel_faults: dict[str, str] = field(default_factory=dict)
    """See TaskResult."""

    @staticmethod
    def read(folder: Path, num_tasks: int) -> NodeResult:
        """Read the results of the tasks of a node from its folder."""
        results = [TaskResult.read(folder / str(task)) for task in range(num_tasks)]
        faults = [result.fault for result in results if result is not None and result.fault is not None]
        if not faults and None in results:
            faults = [f"does not answer, or cannot write to {folder.parent}"]
        bandwidths = [result.bandwidth for result in results if result is not None]
        kernel_faults: dict[str, str] = {}
        for result in results:
            kernel_faults |= {} if result is None else result.kernel_faults
        return NodeResult(
            next(iter(faults), None), tuple(gb for gb in bandwidths if gb is not None), kernel_faults
        )


def _faults(results: Mapping[str, NodeResult]) -> dict[str, str]:
    """Return node -> fault of the nodes that are not fit."""
    return {node: result.fault for node, result in results.items() if result.fault is not None}


def _run_check(
    job: Job, check: str, groups: Sequence[Sequence[str]], folder: Path, arguments: Sequence[str] = ()
) -> dict[str, NodeResult]:
    """Run a check on each group of nodes, all groups at the same time; return the result of each node.

    Args:
        arguments: further arguments of node_checks.py.
    """
    results = folder / "logs" / "preflight"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    command = [sys.executable, "-m", "svd_ds.jobs.node_checks", check, str(folder), str(results)]
    command += ["--gpus", str(job.gpus), *arguments]
    # Together: a task per GPU, as in training. The job may have fewer CPUs, or other tasks.
    num_tasks = max(job.gpus, 1) if check == "together" else 1
    layout = ["--cpus-per-task=1", "--overcommit"] if num_tasks > 1 else []
    steps = [
        job.start_step(
            command,
            f"--nodes={len(group)}",
            f"--ntasks={num_tasks * len(group)}",
            f"--ntasks-per-node={num_tasks}",
            "--distribution=block",
            *layout,
            f"--nodelist={','.join(group)}",
            # srun would read a % in the folder's name as a pattern.
            f"--error={str(folder).replace('%', '%%')}/logs/preflight.log",
            # A node that fails must not end the step for those that are slower to answer.
            "--kill-on-bad-exit=0",
            MASTER_ADDR=group[0],
        )
        for group in groups
    ]
    _wait(steps)
    return {node: NodeResult.read(results / node, num_tasks) for group in groups for node in group}


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
