"""NVIDIA GPUs that torch cannot use: refused, unless CUDA_VISIBLE_DEVICES hides them."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svd_ds.parallel import devices
from svd_ds.parallel import env as environment
from svd_ds.parallel.devices import UNUSABLE, check_gpus_are_usable, num_gpus
from svd_ds.parallel.env import Env

MakeGPUs = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeGPUs:
    """machine(files, driver) makes a machine with these device files, of which torch can use none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DEV", tmp_path / "dev")
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "gpus")
    (tmp_path / "dev").mkdir()

    def make(*files: str, driver: bool = False) -> None:
        for name in files:
            (tmp_path / "dev" / name).touch()
        if driver:
            (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)

    return make


def fail_to_start(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("files", "driver", "environ"),
    [
        (["nvidia0", "nvidiactl"], True, {}),
        ([], True, {}),
        ([], False, {"SLURM_GPUS_ON_NODE": "8"}),
        ([], False, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ([], False, {"CUDA_VISIBLE_DEVICES": "GPU-5fd4f087"}),
    ],
)
def test_torch_without_cuda_is_refused_where_there_are_gpus(
    machine: MakeGPUs,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    driver: bool,
    environ: dict[str, str],
) -> None:
    machine(*files, driver=driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(ValueError) as refused:
        check_gpus_are_usable(environ)
    assert str(refused.value) == (
        f"{UNUSABLE}: torch 2.13.0+cpu is built without CUDA; CUDA_VISIBLE_DEVICES= (empty) runs on its CPUs"
    )
    for hidden in ("", "-1"):
        check_gpus_are_usable(environ | {"CUDA_VISIBLE_DEVICES": hidden})


def test_machine_without_gpus_runs_on_cpus(machine: MakeGPUs) -> None:
    machine("nvidiactl", "null")
    check_gpus_are_usable({})
    check_gpus_are_usable({"SLURM_GPUS_ON_NODE": "0"})


def test_gpus_that_slurm_has_not_allocated_are_left_alone(
    machine: MakeGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(path: Path, flags: int) -> int:
        raise OSError(code, os.strerror(code), str(path))

    machine("nvidia0", driver=True)
    monkeypatch.setattr(os, "open", forbid)
    code = errno.EPERM
    check_gpus_are_usable({})
    code = errno.EIO
    with pytest.raises((ValueError, OSError), match=UNUSABLE):
        check_gpus_are_usable({})


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", ValueError),
        ("Found no NVIDIA driver on your system.\nPlease check that you have an NVIDIA GPU.", OSError),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", OSError),
    ],
)
def test_reason_is_torch_s_own_and_a_failing_driver_is_retryable(
    machine: MakeGPUs, monkeypatch: pytest.MonkeyPatch, message: str, kind: type[Exception]
) -> None:
    machine("nvidia0")
    fail_to_start(monkeypatch, message)
    with pytest.raises(kind) as refused:
        check_gpus_are_usable({})
    assert type(refused.value) is kind
    assert " ".join(message.split()).rstrip(".") in str(refused.value) and "\n" not in str(refused.value)


def test_rank_is_refused_before_it_meets_the_others(
    machine: MakeGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine("nvidia0")
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    with pytest.raises((ValueError, OSError), match=UNUSABLE):
        environment.init(Env.read(variables))


def test_usable_gpus_are_counted_without_torch_s_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: ...", UserWarning, stacklevel=1)
        return True

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert num_gpus() == 8
    check_gpus_are_usable({"CUDA_VISIBLE_DEVICES": "0"})
