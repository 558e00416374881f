"""Where a process stands among the ranks of a run, read once from its environment.

Three ways to start a rank are understood, the first that fits wins:
- torchrun or tools/launch.py: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;
- srun: a task of a Slurm job step. The shell of sbatch or salloc is one rank of its own, not a task;
- by hand: one rank, no network.
Nothing else in svd_ds reads these variables.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(minutes=30)
"""For another rank, where nothing else is asked for."""
STARTED = "SVD_DS_STARTED"
"""Variable by which tools/job.py hands on when the job was first started, in ISO format."""
_stores: list[dist.Store] = []
_runs = itertools.count()
"""Runs that this process has joined, as with a multirun: every rank counts alike."""


@dataclass(frozen=True)
class Env:
    """One rank's place in the run."""

    rank: int
    world: int
    """Ranks in the run."""
    local_rank: int
    """Position among this machine's ranks."""
    local_world: int
    """Ranks on this machine."""
    address: str
    """Host of rank 0, where the ranks find each other."""
    port: int
    device: torch.device
    backend: str
    """torch.distributed's backend: tensors of the host always travel over gloo."""

    @staticmethod
    def read(environ: Mapping[str, str] = os.environ) -> Env:
        """Read the launcher's variables. ValueError where they are incomplete."""
        place = _torchrun(environ) or _srun(environ) or _Place(0, 1, 0, 1, "127.0.0.1", 0)
        if not 0 <= place.rank < place.world:
            raise ValueError(f"rank {place.rank} is not among the {place.world} ranks of the run")
        device = _device(place.local_rank, _num_gpus())
        return Env(
            rank=place.rank,
            world=place.world,
            local_rank=place.local_rank,
            local_world=place.local_world,
            address=place.address,
            port=place.port,
            device=device,
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        )

    def check_gpus(self) -> None:
        """ValueError where this machine has too few for its ranks."""
        if 1 < (gpus := _num_gpus()) < self.local_world:
            raise ValueError(f"{self.local_world} ranks on this machine need a GPU each, and it has {gpus}")


def host(environ: Mapping[str, str] = os.environ) -> str:
    """This machine's name, Slurm's own where it has one."""
    return environ.get("SLURMD_NODENAME") or os.uname().nodename


def restart_id(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Of a Slurm job, its number and how often it was queued again: a later start of a run has a higher one.
    Other launchers have none, (0, 0)."""
    return (
        _number(environ, "SLURM_JOB_ID", default=0),
        _number(environ, "SLURM_RESTART_COUNT", default=0),
    )


def start_time(env: Env, environ: Mapping[str, str] = os.environ) -> datetime:
    """When the run was started, the same on all ranks: what a job hands on, else rank 0's clock.

    All ranks call it equally often, before `init`.
    """
    if handed_on := environ.get(STARTED):
        return datetime.fromisoformat(handed_on)
    now = datetime.now()
    if env.world == 1:
        return now
    # Rank 0 may host the store: it stays open, so that no rank comes too late.
    _stores.append(_rendezvous(env, WAIT)[0])
    key = f"start-time-{len(_stores)}"
    if env.rank == 0:
        _stores[-1].set(key, now.isoformat())
    return datetime.fromisoformat(_stores[-1].get(key).decode())


def init(env: Env, timeout: timedelta = WAIT) -> None:
    """Join the run: after this the ranks can talk. `timeout` bounds every wait for another rank. Raises as
    `Env.check_gpus` does."""
    env.check_gpus()
    # For DeepSpeed, which reads the environment itself: LOCAL_RANK is its device's index, and without
    # LOCAL_SIZE it starts a process to count the processor's NUMA nodes at every reduction of gradients.
    local_rank = env.local_rank if env.device.index is None else env.device.index
    os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world))
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_SIZE=str(env.local_world))
    device_id = None
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
        device_id = env.device
    if env.world == 1:
        dist.init_process_group(
            env.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id
        )
    else:
        store, rank, world = _rendezvous(env, timeout)
        dist.init_process_group(
            env.backend,
            # A launcher's store outlives a run, and the next of these processes must not read its addresses.
            store=dist.PrefixStore(f"run-{next(_runs)}", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device_id,
        )


def _rendezvous(env: Env, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store that all ranks share, this rank and their number."""
    # torch reads them; torchrun has set them, srun has not.
    os.environ.update(RANK=str(env.rank), WORLD_SIZE=str(env.world))
    os.environ.update(MASTER_ADDR=env.address, MASTER_PORT=str(env.port))
    return next(dist.rendezvous("env://", env.rank, env.world, timeout=timeout))


def shutdown() -> None:
    """Leave the run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def supports_bf16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 arithmetic in hardware; without it bfloat16 is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True)
class _Place:
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int


def _torchrun(environ: Mapping[str, str]) -> _Place | None:
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world = _number(environ, "WORLD_SIZE")
    return _Place(
        rank=_number(environ, "RANK"),
        world=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world=_number(environ, "LOCAL_WORLD_SIZE", default=world),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", default=0 if world == 1 else None),
    )


def _srun(environ: Mapping[str, str]) -> _Place | None:
    # sbatch sets SLURM_PROCID in its shell too, and salloc's shell is a step of one task: the step's own task
    # count tells what srun really started.
    if not all(name in environ for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        return None
    tasks_per_node = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"]))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    # Every rank must find the same port, and two steps on one node another; below the ephemeral range.
    step = 7 * _number(environ, "SLURM_JOB_ID", default=0) + _number(environ, "SLURM_STEP_ID")
    port = 15000 + step % 15000
    return _Place(
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


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(local_rank: int, gpus: int) -> torch.device:
    if gpus == 0:
        return torch.device("cpu")
    # Slurm's GPU binding shows each task its own GPU as the only one.
    return torch.device("cuda", local_rank if gpus > 1 else 0)
