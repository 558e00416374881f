"""Rank, world size and master address from torchrun, srun, or neither; the device of a rank."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from svd_ds.parallel import env as environment
from svd_ds.parallel.env import Env, supports_bf16

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[03-05,9],big1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[04-05],big1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def place(env: Env) -> tuple[int, int, int, int, str]:
    return env.rank, env.world, env.local_rank, env.local_world, env.address


def test_process_started_by_hand_is_the_only_rank() -> None:
    env = Env.read({})
    assert place(env) == (0, 1, 0, 1, "127.0.0.1")
    assert (env.device, env.backend) == (torch.device("cpu"), "gloo")


def test_torchrun_variables_give_the_rank() -> None:
    env = Env.read(TORCHRUN)
    assert place(env) == (5, 8, 1, 4, "head")
    assert env.port == 29500


def test_srun_counts_the_tasks_of_its_own_step() -> None:
    env = Env.read(SRUN)
    assert place(env) == (3, 5, 1, 2, "gpu04")
    peer = Env.read(SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert place(peer) == (4, 5, 0, 1, "gpu04")
    assert peer.port == env.port
    assert Env.read(SRUN | {"SLURM_STEP_ID": "3"}).port != env.port
    assert Env.read(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}).address == "10.0.0.1"


def test_batch_shell_is_one_rank() -> None:
    shell = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert place(Env.read(shell)) == (0, 1, 0, 1, "127.0.0.1")


def test_interactive_shell_is_one_rank() -> None:
    shell = SRUN | {
        "SLURM_STEP_ID": "4294967290",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    assert place(Env.read(shell | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}))[:4] == (
        0,
        1,
        0,
        1,
    )


def test_torchrun_takes_precedence_over_srun() -> None:
    assert place(Env.read(SRUN | TORCHRUN)) == (5, 8, 1, 4, "head")


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("n[1-3,7],m2", "n1"),
        ("rack[01-02]n[3,5]", "rack01n3"),
        ("n[7]-ib", "n7-ib"),
    ],
)
def test_first_host_of_a_node_list_is_the_master(nodelist: str, first: str) -> None:
    assert Env.read(SRUN | {"SLURM_STEP_NODELIST": nodelist}).address == first


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK"),
        (TORCHRUN | {"RANK": "8"}, "8"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
    ],
)
def test_incomplete_launch_is_refused(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Env.read(environ)


@pytest.mark.parametrize(("gpus", "index"), [(4, 1), (8, 1), (1, 0)])
def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    env = Env.read(TORCHRUN)
    assert env.device == torch.device("cuda", index)
    assert env.backend == "cpu:gloo,cuda:nccl"


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for rank in range(4):  # any rank can report it, and none waits for another
        env = Env.read(TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        with pytest.raises(ValueError, match=r"4 ranks .* has 3"):
            environment.init(env)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_bf16_is_supported_by_capability(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert supports_bf16(torch.device("cpu")) is native


def test_barrier_and_shutdown_of_one_process_ask_for_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("there is no group to ask"))
    environment.barrier()
    environment.shutdown()


def test_host_is_named_by_slurm() -> None:
    assert environment.host({"SLURMD_NODENAME": "gpu04"}) == "gpu04"
    assert environment.host({}) == os.uname().nodename


def test_restart_id_of_a_later_restart_is_higher() -> None:
    first, again = ({"SLURM_JOB_ID": "7"} | more for more in ({}, {"SLURM_RESTART_COUNT": "1"}))
    assert environment.restart_id({}) < environment.restart_id(first) < environment.restart_id(again)
    assert environment.restart_id(again) < environment.restart_id({"SLURM_JOB_ID": "12"})


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Soft and hard limit on open files of this process, which are not changed."""
    limits = [1024, 4096]

    def set_limits(kind: int, values: tuple[int, int]) -> None:
        limits[:] = values

    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    return limits


def test_limit_on_open_files_is_raised_to_the_hard_limit(limits: list[int]) -> None:
    environment.raise_open_file_limit(384)
    assert limits == [4096, 4096]


def test_unlimited_open_files_are_enough(limits: list[int]) -> None:
    limits[:] = 1024, resource.RLIM_INFINITY
    environment.raise_open_file_limit(100_000)
    assert limits == [resource.RLIM_INFINITY] * 2


def test_hard_limit_too_low_for_the_ranks_is_refused(limits: list[int]) -> None:
    limits[:] = 512, 1024
    environment.raise_open_file_limit(256)
    with pytest.raises(ValueError, match=r"may open 1024 files .*, and a run of 384 ranks needs 1408"):
        environment.raise_open_file_limit(384)


def test_limit_that_may_not_be_raised_is_left(limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, values: tuple[int, int]) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    environment.raise_open_file_limit(64)
    assert limits == [1024, 4096]


def test_gpu_is_set_but_not_bound_to_the_process_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = torch.device("cuda", 0)
    env = replace(Env.read({}), device=gpu, backend="cpu:gloo,cuda:nccl")
    used: list[torch.device] = []
    given: dict[str, object] = {}
    monkeypatch.setattr(Env, "check_gpus", lambda env: None)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(environment, "bind_to_gpu_cores", lambda device: "bound to the cores 8-11")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    environment.init(env)
    assert used == [gpu]
    assert given.keys() == {"store", "rank", "world_size", "timeout"}, "no device_id: no eager communicators"
    assert capsys.readouterr().err == "rank 0: bound to the cores 8-11\n"
