"""Kernels that do not import, do not compile or compute wrong numbers are found before the first step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_ds.model.layers import FeedForward, SelfAttention, _GroupNorm, choose_kernels
from svd_ds.model.ops import attention, fused, trial
from svd_ds.model.ops.trial import (
    FUSED,
    KernelChoice,
    KernelSettings,
    choose,
    find_kernel_faults,
    run_trials,
    try_attention,
)
from svd_ds.model.unet import UNet, UNetConfig

CPU = torch.device("cpu")
FINE = {FUSED: "", "triton": "", "sdpa": ""}


def settings(kernels: str = "auto", spatial: str = "auto", temporal: str = "auto") -> KernelSettings:
    keys = {"model.spatial_attention": spatial, "model.temporal_attention": temporal}
    return KernelSettings(kernels, keys, head_width=16)


def fails(error: Exception) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Tensor:
        raise error

    return kernel


def gcc(*arguments: Any) -> Tensor:
    raise subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/tmpx1/main.c"])


def wrong_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 1.1 * attention._reference(q, k, v)


def nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention._reference(q, k, v) * float("nan")


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    right = attention._reference(q, k, v)
    return right + 0.2 * (v - v.detach())


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (attention._sdpa, ""),
        (
            fails(RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")),
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable",
        ),
        (gcc, "the C compiler, which needs Python's header files, ends with exit code 1"),
        (wrong_result, "the result of a trial differs from float64 by 0.1 of its norm, more than 0.005"),
        (nan, "the result of a trial differs from float64 by nan of its norm, more than 0.005"),
        (wrong_gradient, "the gradient 3 of a trial differs from float64 by"),
        (fails(ValueError("x" * 1000)), "ValueError: xxx"),
    ],
    ids=["works", "no compiler", "no Python.h", "wrong result", "NaN", "wrong gradient", "long message"],
)
def test_trial_finds_the_fault_of_a_kernel(kernel: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.KERNELS, "sdpa", kernel)
    found = try_attention("sdpa", CPU, torch.float32, head_width=16)
    assert found == fault if not fault else found.startswith(fault)
    assert len(found) <= trial.MAX_REASON


def test_missing_memory_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.KERNELS, "sdpa", fails(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        try_attention("sdpa", CPU, torch.float32, head_width=16)


def test_trials_draw_from_no_shared_generator() -> None:
    before = torch.get_rng_state()
    assert try_attention("sdpa", CPU, torch.bfloat16, head_width=16) == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer", ["GEGLU", "GroupNormSiLU"])
@pytest.mark.parametrize("fault", ["", "wrong", "raises"])
def test_trial_of_tritons_norm_and_geglu(layer: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's functions play Triton's kernels, one of them with a fault."""

    def apply(original: Any) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            if fault == "raises":
                raise RuntimeError("PassManager::run failed")
            return original.apply(*inputs) * (1.5 if fault else 1.0)

        return run

    module: Any = ModuleType("svd_ds.model.ops.fused_triton")
    module.GEGLU, module.GroupNormSiLU = fused._GEGLU, fused._GroupNormSiLU
    setattr(module, layer, SimpleNamespace(apply=apply(getattr(module, layer))))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "svd_ds.model.ops.kernels", SimpleNamespace(INTERPRETED=True))
    monkeypatch.setattr(fused, "triton_installed", lambda: True)
    expected = {"": "", "wrong": "the result of a trial differs", "raises": "RuntimeError: PassManager"}[
        fault
    ]
    found = trial.try_fused(CPU, torch.float32)
    assert found.startswith(expected) and bool(found) == bool(fault)


def test_real_triton_kernels_pass_their_trial() -> None:
    if not fused.triton_installed():
        pytest.skip("Triton is not installed")
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    assert trial.try_fused(device, torch.float32) == ""
    assert try_attention("triton", device, torch.float32, head_width=16) == ""
    assert (
        find_kernel_faults(KernelSettings("triton", {"model.temporal_attention": "triton"}, 16), device) == {}
    )


def test_faults_are_named_by_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {FUSED: "no C compiler", "triton": "", "flash_attn": "wrong numbers"}
    monkeypatch.setattr(trial, "run_trials", lambda settings, device, dtype: report)
    assert find_kernel_faults(settings(), CPU) == {
        "Triton's group norm and GEGLU": "no C compiler",
        "flash_attn": "wrong numbers",
    }


def test_nothing_of_auto_is_tried_on_a_cpu() -> None:
    assert run_trials(settings(), CPU, torch.float32) == {}
    assert choose(settings(), [("node1", {})]) == KernelChoice("auto", "auto")


@pytest.mark.parametrize(
    ("capability", "dtype", "package", "tried"),
    [
        ((9, 0), torch.bfloat16, lambda: None, [FUSED, "triton", "flash_attn_3", "sdpa"]),
        ((9, 0), torch.bfloat16, OSError("undefined symbol"), [FUSED, "triton", "flash_attn_3", "sdpa"]),
        ((9, 0), torch.bfloat16, ModuleNotFoundError("flash_attn_interface"), [FUSED, "triton", "sdpa"]),
        ((9, 0), torch.float32, lambda: None, [FUSED, "triton", "sdpa"]),
        ((8, 0), torch.bfloat16, lambda: None, [FUSED, "triton", "sdpa"]),
        ((10, 0), torch.bfloat16, lambda: None, [FUSED, "triton", "sdpa"]),
    ],
)
def test_auto_tries_flash_attention_3_on_hopper_if_it_is_there(
    capability: tuple[int, int],
    dtype: torch.dtype,
    package: Any,
    tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "import_flash", lambda backend: package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for function in ("try_fused", "try_attention"):
        monkeypatch.setattr(trial, function, lambda *arguments: "")
    assert list(run_trials(settings(), torch.device("cuda", 0), dtype)) == tried


def test_auto_takes_the_kernels_that_work_on_all_hosts() -> None:
    fast = FINE | {"flash_attn_3": ""}
    assert choose(settings(), [("a", fast), ("b", fast)]) == KernelChoice(
        "triton", ("triton", "flash_attn_3", "sdpa")
    )
    other_gpu = choose(settings(), [("a", fast), ("b", FINE)])
    assert other_gpu.attention == ("triton", "sdpa")
    assert other_gpu.notes == (
        "torch's kernels replace FlashAttention-3, which cannot be used on b: it is not for the GPU there",
    )


def test_auto_falls_back_on_all_ranks_with_one_note() -> None:
    broken = FINE | dict.fromkeys((FUSED, "triton"), "RuntimeError: Failed to find C compiler.")
    reports = [("a", FINE), ("b", broken), ("b", FINE), ("c", broken), ("c", broken)]
    choice = choose(settings(), reports)
    assert (choice.kernels, choice.attention) == ("torch", ("sdpa",))
    assert choice.notes == (
        "torch's kernels replace Triton's group norm and GEGLU and Triton's attention, which cannot be used "
        "on b and 1 further hosts: RuntimeError: Failed to find C compiler.",
    )


@pytest.mark.parametrize(
    ("named", "tried", "sentence"),
    [
        (settings(kernels="triton"), FUSED, "model.kernels is triton, which .*: choose auto or torch"),
        (
            settings(spatial="flash_attn"),
            "flash_attn",
            "model.spatial_attention is flash_attn, .*auto or sdpa",
        ),
        (
            settings(temporal="triton"),
            "triton",
            "model.temporal_attention is triton, .*: choose auto or sdpa",
        ),
        (settings(), "sdpa", "torch's attention, sdpa, "),
    ],
)
def test_kernel_that_is_chosen_by_name_is_refused(named: KernelSettings, tried: str, sentence: str) -> None:
    fine = FINE | {tried: ""}
    choose(named, [("a", fine), ("b", fine)])
    expected = f"^{sentence}".replace("which .*", "which cannot be used on b: no compiler")
    with pytest.raises(ValueError, match=expected):
        choose(named, [("a", fine), ("b", fine | {tried: "no compiler"})])


@pytest.mark.parametrize("fault", [ImportError("libcuda.so.1: cannot open shared object file"), None])
def test_triton_that_cannot_be_imported_or_run_is_reported(
    fault: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(device: torch.device) -> str:
        if fault is not None:
            raise fault
        return "is not installed"

    for user in (attention, trial):
        monkeypatch.setattr(user, "triton_unavailable", unavailable)
    expected = "it is not installed" if fault is None else "ImportError: libcuda.so.1"
    assert trial.try_fused(CPU, torch.float32).startswith(expected)
    assert try_attention("triton", CPU, torch.float32, head_width=16).startswith(expected)


def test_choice_reaches_every_layer_and_leaves_the_config() -> None:
    config = UNetConfig(
        widths=(32,), attention_levels=(True,), num_layers=1, context_width=8, head_width=16,
        spatial_attention="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        unet = UNet(config)
    choose_kernels(unet, "torch", ("triton", "sdpa"))
    assert unet.config == config
    backends, kernels = set(), set()
    for name, module in unet.named_modules():
        if isinstance(module, (_GroupNorm, FeedForward)):
            kernels.add(module.kernels)
        if isinstance(module, SelfAttention):
            backends.add(("temporal" if ".temporal." in name else "spatial", module.backend))
    assert kernels == {"torch"}
    assert backends == {("spatial", "sdpa"), ("temporal", ("triton", "sdpa"))}
