"""Checks of one node, and the network between ranks that stand for nodes."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from svd_ds.jobs import node_checks
from svd_ds.jobs.node_checks import (
    UNREACHABLE_NAME,
    TaskResult,
    check_node,
    loopback_address,
    ring_rounds,
    run_check,
)
from svd_ds.model.ops.trial import KernelSettings
from svd_ds.parallel.devices import UNUSABLE
from svd_ds.parallel.env import host

FAULT = f"{UNUSABLE}: torch 2.13.0 is built without CUDA"


def test_healthy_machine_passes_and_missing_gpu_or_disk_is_an_error(tmp_path: Path) -> None:
    check_node(tmp_path, gpus=0)
    with pytest.raises(OSError, match="GPUs of its 1000"):
        check_node(tmp_path, gpus=1000)
    with pytest.raises(OSError, match="nowhere"):
        check_node(tmp_path / "nowhere", gpus=0)


def test_gpu_of_a_node_that_torch_cannot_use_is_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError(FAULT)

    monkeypatch.setattr(node_checks, "check_gpus_are_usable", fail)
    monkeypatch.setattr(node_checks, "leave", sys.exit)
    monkeypatch.setattr(sys, "argv", ["node_checks", "alone", str(tmp_path), str(tmp_path), "--gpus", "8"])
    with pytest.raises(SystemExit) as ended:
        node_checks.main()
    assert ended.value.code == 1
    assert TaskResult.read(tmp_path / host() / "0") == TaskResult(FAULT)


@pytest.mark.parametrize("count", range(1, 9))
def test_every_pair_of_neighbours_is_in_a_round_and_no_node_twice_in_one(count: int) -> None:
    rounds = ring_rounds(range(count))
    pairs = [pair for pairs in rounds for pair in pairs]
    neighbours = {frozenset((i, (i + 1) % count)) for i in range(count)} if count > 1 else set()
    assert set(map(frozenset, pairs)) == neighbours and len(pairs) == len(neighbours)
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)


@pytest.mark.parametrize(
    ("address", "environ", "found"),
    [
        ("127.0.1.1", {}, "127.0.1.1"),
        ("10.0.0.7", {}, None),
        ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "ib0"}, None),
    ],
)
def test_loopback_address_of_the_host_name_is_found(
    monkeypatch: pytest.MonkeyPatch, address: str, environ: dict[str, str], found: str | None
) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    assert loopback_address("gpu7", environ) == found


def test_node_that_is_not_reached_names_the_variable_if_its_name_is_a_loopback_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(env: object) -> float:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(node_checks, "check_interconnect", fail)
    monkeypatch.setattr(node_checks, "loopback_address", lambda name: "127.0.1.1")
    fault = run_check("together", tmp_path, gpus=0).fault
    assert fault is not None and fault.startswith(UNREACHABLE_NAME)
    assert all(word in fault for word in ("127.0.1.1", "GLOO_SOCKET_IFNAME", "connectFullMesh"))
    monkeypatch.setattr(node_checks, "loopback_address", lambda name: None)
    assert run_check("together", tmp_path, gpus=0) == TaskResult("Gloo connectFullMesh failed")


def test_node_whose_kernels_fail_is_fit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, environ = [], {}
    faults = {"Triton's attention": "RuntimeError: Failed to find C compiler"}

    def find_faults(settings: KernelSettings, device: torch.device) -> dict[str, str]:
        tried.append((settings, device))
        return faults

    monkeypatch.setattr(node_checks, "check_node", lambda folder, gpus: None)
    monkeypatch.setattr(node_checks, "find_kernel_faults", find_faults)
    monkeypatch.setattr(node_checks, "use_local_cache", lambda: environ.update(local=True))
    kernels = KernelSettings("auto", {"model.spatial_attention": "auto"}, 64)
    assert run_check("alone", tmp_path, 8, kernels) == TaskResult(None, kernel_faults=faults)
    assert tried == [(kernels, torch.device("cuda", 0))] and environ == {"local": True}
    assert run_check("alone", tmp_path, 0, kernels) == TaskResult(None), "a CPU has torch's kernels"
    assert run_check("alone", tmp_path, 8) == TaskResult(None)


def test_command_tries_the_kernels_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    kernels = KernelSettings("torch", {"model.spatial_attention": "sdpa"}, 64)
    monkeypatch.setattr(
        node_checks, "run_check", lambda *arguments: given.append(arguments) or TaskResult(None)
    )
    words = ["alone", str(tmp_path), str(tmp_path), "--gpus", "8", "--kernels", json.dumps(asdict(kernels))]
    monkeypatch.setattr(sys, "argv", ["node_checks", *words])
    node_checks.main()
    assert given == [("alone", tmp_path, 8, kernels)]
