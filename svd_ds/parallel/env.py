"""Rank, number of ranks and device of this process, read once from the launcher's variables.

Three ways to start a rank are supported, in this order:
- torchrun or tools/launch.py: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;
- srun: a task of a Slurm job step. The shell of sbatch or salloc is not a task: a run there has one rank;
- by hand: one rank, no network.
Nothing else in svd_ds reads these variables.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import torch
import torch.distributed as dist

from svd_ds.parallel.affinity import bind_to_gpu_cores
from svd_ds.parallel.devices import check_gpus_are_usable, num_gpus

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Default timeout of collectives and of the rendezvous."""
STARTED = "SVD_DS_STARTED"
"""Environment variable in which tools/job.py passes the time of the job's first start, in ISO format."""
OPEN_FILES, OPEN_FILES_PER_RANK = 256, 3
"""Open files that a process needs: its own (data, logs, libraries), and connections to each rank. gloo has
one; rank 0 hosts the store, to which every rank connects once in `init` and once in `start_time`."""
_stores: list[dist.Store] = []
_runs = itertools.count()
"""Counter of the runs that this process has joined, several with a multirun; equal on every rank."""


@dataclass(frozen=True)
class Env:
    """One rank of a run."""

    rank: int
    world: int
    """Number of ranks in the run."""
    local_rank: int
    """Index among the ranks on this machine."""
    local_world: int
    """Number of ranks on this machine."""
    address: str
    """Host of rank 0, for the rendezvous."""
    port: int
    device: torch.device
    backend: str
    """Backend of torch.distributed; tensors in host memory always use gloo."""

    @staticmethod
    def read(environ: Mapping[str, str] = os.environ) -> Env:
        """Read the launcher's variables.

        Raises:
            ValueError: they are incomplete, or contradict each other.
        """
        found = _torchrun(environ) or _srun(environ) or _LauncherRank(0, 1, 0, 1, "127.0.0.1", 0)
        if not 0 <= found.rank < found.world:
            raise ValueError(f"rank {found.rank} is not among the {found.world} ranks of the run")
        device = _device(found.local_rank, num_gpus())
        return Env(
            rank=found.rank,
            world=found.world,
            local_rank=found.local_rank,
            local_world=found.local_world,
            address=found.address,
            port=found.port,
            device=device,
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        )

    def check_gpus(self) -> None:
        """Check that this machine has a GPU for each of its ranks, at most one that they share, or none.

        Raises:
            ValueError: there are fewer GPUs than ranks; or see `check_gpus_are_usable`.
            OSError: see `check_gpus_are_usable`.
        """
        check_gpus_are_usable()
        if 1 < (gpus := num_gpus()) < self.local_world:
            raise ValueError(f"{self.local_world} ranks on this machine need a GPU each, and it has {gpus}")


def host(environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine, in a Slurm job Slurm's name of the node."""
    return environ.get("SLURMD_NODENAME") or os.uname().nodename


def restart_id(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the id of the Slurm job and its restart count, (0, 0) without Slurm. Later restarts compare
    higher."""
    return (
        _number(environ, "SLURM_JOB_ID", default=0),
        _number(environ, "SLURM_RESTART_COUNT", default=0),
    )


def start_time(env: Env, environ: Mapping[str, str] = os.environ) -> datetime:
    """Return the start time of the run, the same on all ranks: from tools/job.py, else from rank 0's clock.

    All ranks call it the same number of times, before `init`.
    """
    if job_started := environ.get(STARTED):
        return datetime.fromisoformat(job_started)
    now = datetime.now()
    if env.world == 1:
        return now
    raise_open_file_limit(env.world)
    # Rank 0 may host the store, so it is kept open for ranks that connect later.
    _stores.append(_rendezvous(env, DEFAULT_TIMEOUT)[0])
    key = f"start-time-{len(_stores)}"
    if env.rank == 0:
        _stores[-1].set(key, now.isoformat())
    return datetime.fromisoformat(_stores[-1].get(key).decode())


def init(env: Env, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Initialise torch.distributed. All ranks call it.

    Args:
        timeout: limit of the rendezvous and of every collective.

    Raises:
        ValueError, OSError: see `Env.check_gpus` and `raise_open_file_limit`.
    """
    env.check_gpus()
    raise_open_file_limit(env.world)
    # DeepSpeed reads the environment itself: LOCAL_RANK as the index of the device; without LOCAL_SIZE it
    # starts a process that counts the NUMA nodes of the CPU, at every reduction of gradients.
    local_rank = env.local_rank if env.device.index is None else env.device.index
    os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world))
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_SIZE=str(env.local_world))
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
        if (line := bind_to_gpu_cores(env.device)) is not None:
            print(f"rank {env.rank}: {line}", file=sys.stderr)
    # Without device_id: it would bind the device, and every process group then gets an NCCL communicator at
    # once, by ncclCommSplit, in which all ranks take part. Without it the first collective creates it.
    if env.world == 1:
        dist.init_process_group(env.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, world = _rendezvous(env, timeout)
        dist.init_process_group(
            env.backend,
            # A launcher's store outlives a run: the next run must not read the addresses of this one.
            store=dist.PrefixStore(f"run-{next(_runs)}", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )


def raise_open_file_limit(num_ranks: int) -> None:
    """Raise the limit on open files of this process, and of processes that it starts, to the hard limit.

    Slurm passes on the soft limit of the shell that submitted the job, often 1024.

    Raises:
        ValueError: the limit is too low for a run of `num_ranks` ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Not permitted in a sandbox, or where the kernel's own limit (fs.nr_open) was lowered.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + OPEN_FILES_PER_RANK * num_ranks
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ValueError(
            f"a process may open {limit} files on {host()} (ulimit -Hn), and a run of {num_ranks} ranks "
            f"needs {needed}"
        )


def _rendezvous(env: Env, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the store that all ranks share, this rank, and the number of ranks."""
    # torch reads these variables; torchrun sets them, srun does not.
    os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world))
    os.environ.update(MASTER_ADDR=env.address, MASTER_PORT=str(env.port))
    return next(dist.rendezvous("env://", env.rank, env.world, timeout=timeout))


def shutdown() -> None:
    """Shut torch.distributed down."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def supports_bf16(device: torch.device) -> bool:
    """Return True if `device` has bfloat16 arithmetic in hardware; otherwise it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True)
class _LauncherRank:
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int


def _torchrun(environ: Mapping[str, str]) -> _LauncherRank | None:
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world = _number(environ, "WORLD_SIZE")
    return _LauncherRank(
        rank=_number(environ, "RANK"),
        world=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world=_number(environ, "LOCAL_WORLD_SIZE", default=world),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", default=0 if world == 1 else None),
    )


def _srun(environ: Mapping[str, str]) -> _LauncherRank | None:
    # sbatch sets SLURM_PROCID in its shell too, and salloc's shell is a step of one task: only the task count
    # of the step is the number of processes that srun started.
    if not all(name in environ for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        return None
    tasks_per_node = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"]))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    # All ranks of a step must find the same port, and two steps on one node different ones, all below the
    # ephemeral range.
    step = 7 * _number(environ, "SLURM_JOB_ID", default=0) + _number(environ, "SLURM_STEP_ID")
    port = 15000 + step % 15000
    return _LauncherRank(
        rank=_number(environ, "SLURM_PROCID"),
        world=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world=tasks_per_node[_number(environ, "SLURM_NODEID", default=0)],
        address=environ.get("MASTER_ADDR", _first_host(nodes)),
        port=_number(environ, "MASTER_PORT", default=port),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"the launcher's variable {name} is {text!r}: it must be a whole number")
    return int(text)


def _first_host(nodelist: str) -> str:
    """First name of a Slurm node list: "node[03-05,9],gpu1" -> "node03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodelist


def _expand_counts(counts: str) -> list[int]:
    """Tasks on each node from Slurm's short form: "2(x3),1" -> [2, 2, 2, 1]."""
    expanded: list[int] = []
    for part in counts.split(","):
        count, _, repeats = part.rstrip(")").partition("(x")
        expanded += [int(count)] * int(repeats or 1)
    return expanded


def _device(local_rank: int, gpus: int) -> torch.device:
    if gpus == 0:
        return torch.device("cpu")
    # Slurm's GPU binding shows each task its own GPU as the only one.
    return torch.device("cuda", local_rank if gpus > 1 else 0)
