"""Preflight checks that run on the nodes of a job; preflight.py starts them from the batch host.

    srun --ntasks-per-node=1 python -m svd_ds.jobs.node_checks alone RUN_FOLDER RESULTS --gpus 8
    srun --ntasks-per-node=8 python -m svd_ds.jobs.node_checks together RUN_FOLDER RESULTS --gpus 8

`alone` checks the GPUs and the disks of a node; `together` has one rank per GPU, and checks the network
between the nodes. Each task writes its result to the file RESULTS/NODE/TASK.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from svd_ds.fsync_io import fsync_path, name_errors, write_text
from svd_ds.model.ops.trial import KernelSettings, find_kernel_faults
from svd_ds.parallel import env as environment
from svd_ds.parallel.devices import check_gpus_are_usable, num_gpus
from svd_ds.parallel.env import Env
from svd_ds.parallel.process_group import leave, process_group
from svd_ds.parallel.triton_cache import use_local_cache

RENDEZVOUS_TIMEOUT_S = 90.0
"""Seconds within which the nodes must find each other."""
GPU_MESSAGE, CPU_MESSAGE = 128 << 20, 1 << 20
"""Size in bytes of the messages that measure the bandwidth between nodes."""
NUM_MESSAGES = 5
"""Messages that are timed, after one that opens the connection."""
UNREACHABLE_NAME = "has a name that other nodes cannot reach"
"""Beginning of the fault of a node whose host name is a loopback address."""
Node = TypeVar("Node")


@dataclass(frozen=True)
class TaskResult:
    """Result of a check in one task."""

    fault: str | None
    """Reason why the node should not be used; None if it is fit."""
    bandwidth: float | None = None
    """Bandwidth to a neighbouring node in GB/s in each direction; None if it was not measured."""
    kernel_faults: dict[str, str] = field(default_factory=dict)
    """Kernel of the network that cannot be used on the node, which is fit without it -> why."""

    def write(self, path: Path) -> None:
        """Write the result to a file, in a folder that is created."""
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> TaskResult | None:
        """Read a result; None if there is none, or a full disk has left an empty file."""
        text = path.read_text() if path.exists() else ""
        return TaskResult(**json.loads(text)) if text else None


def ring_rounds(nodes: Sequence[Node]) -> list[list[tuple[Node, Node]]]:
    """Divide the pairs of neighbours in a ring of nodes into rounds in which no node is in two pairs."""
    if len(nodes) < 3:
        return [[(nodes[0], nodes[1])]] if len(nodes) == 2 else []
    ring = [(node, nodes[(i + 1) % len(nodes)]) for i, node in enumerate(nodes)]
    # In a ring of odd length the last pair is a round by itself.
    return [ring[0 : len(ring) - 1 : 2], ring[1::2], *([ring[-1:]] if len(ring) % 2 else [])]


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


def kernel_faults(kernels: KernelSettings | None, gpus: int) -> dict[str, str]:
    """Try the kernels of a network on the first GPU; return those that cannot be used, and why."""
    if kernels is None or not gpus:
        return {}
    use_local_cache()
    return find_kernel_faults(kernels, torch.device("cuda", 0))


def check_interconnect(env: Env) -> float:
    """All-reduce over all ranks of the step, then measure the bandwidth between the nodes.

    Returns:
        See `measure_bandwidth`.

    Raises:
        RuntimeError: the nodes do not reach each other, or the sum is wrong.
    """
    with process_group(env, timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S)):
        ones = torch.ones(1 << 20, device=env.device)
        dist.all_reduce(ones)
        if not bool((ones == env.world).all()):
            raise RuntimeError(f"the sum of {env.world} ones came out as {ones.mean().item()}")
        return measure_bandwidth(env)


def measure_bandwidth(env: Env) -> float:
    """Measure the bandwidth between this rank and the same GPU of the neighbouring nodes. All ranks call it.

    All GPUs of a node send at the same time, as in training: each uses its own network adapter, or its share
    of one.

    Returns:
        GB/s in each direction, to the faster one of the two neighbours in a ring of the nodes. A GPU next to
        a slow one is therefore not slow itself.
    """
    node, local = divmod(env.rank, env.local_world)
    size = GPU_MESSAGE if env.device.type == "cuda" else CPU_MESSAGE
    sent = torch.full((size,), env.rank % 251, dtype=torch.uint8, device=env.device)
    best = 0.0
    for pairs in ring_rounds(range(env.world // env.local_world)):
        environment.barrier()
        for pair in pairs:
            if node in pair:
                peer = sum(pair) - node
                best = max(best, _exchange(sent, peer * env.local_world + local))
    return best


def _exchange(sent: torch.Tensor, peer: int) -> float:
    """Exchange messages with another rank; return GB/s in each direction."""
    received = torch.empty_like(sent)

    def exchange(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(both):
                work.wait()
        if sent.is_cuda:
            torch.cuda.synchronize(sent.device)
        return time.perf_counter() - started

    exchange(1)
    seconds = exchange(NUM_MESSAGES)
    if not bool((received == peer % 251).all()):
        raise RuntimeError(f"the message of rank {peer} arrived with other content")
    return NUM_MESSAGES * sent.numel() / seconds / 1e9


def loopback_address(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of a host name if gloo would use it and no other node can reach it; else None.

    Some images list the host name in /etc/hosts as 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in environ:
        return None
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    return address if ipaddress.ip_address(address).is_loopback else None


def run_check(check: str, folder: Path, gpus: int, kernels: KernelSettings | None = None) -> TaskResult:
    """Run a check in this task.

    Args:
        check: alone or together.
        folder: run folder.
        gpus: number of GPUs that the node should have.
        kernels: kernels of the network to try on the node alone; None tries none.
    """
    try:
        if check == "alone":
            check_node(folder, gpus)
            return TaskResult(None, kernel_faults=kernel_faults(kernels, gpus))
        return TaskResult(None, check_interconnect(Env.read()))
    except (ValueError, OSError, RuntimeError) as error:
        fault = " ".join(str(error).split())
    name = socket.gethostname()
    if check == "together" and (address := loopback_address(name)) is not None:
        fault = (
            f"{UNREACHABLE_NAME}: {name} is {address} in its /etc/hosts; set GLOO_SOCKET_IFNAME (and "
            f"NCCL_SOCKET_IFNAME) in slurm/site.env to the interface between the nodes, such as ib0 ({fault})"
        )
    return TaskResult(fault)


def main() -> None:
    """Run one check in this task and write its result.

    Exit code: 0 if the node is fit, 1 if not.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=("alone", "together"))
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("results", type=Path, help="folder in which each task writes its result")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node should have")
    parser.add_argument("--kernels", type=json.loads, help="settings of the network's kernels, to try them")
    options = parser.parse_args()
    kernels = KernelSettings(**options.kernels) if options.kernels else None
    result = run_check(options.check, options.folder, options.gpus, kernels)
    result.write(options.results / environment.host() / str(environment.Env.read().local_rank))
    if result.fault:
        # Other ranks may still wait for this one.
        leave(1)


if __name__ == "__main__":
    main()
