"""Trial of kernels before the first step: each runs once on small tensors, forward and backward.

A kernel can be installed and not run: Triton compiles at the first launch and needs a C compiler and Python's
header files; a wheel of flash_attn may be built for another torch; a kernel may be wrong on a new GPU. `auto`
then takes another kernel, and a kernel that was chosen by name is refused. A machine's results are plain
data, so that all ranks of a run can decide alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svd_ds.model.ops.attention import FLASH, HALF, Backend, attention, import_flash, unavailable
from svd_ds.model.ops.fused import geglu, group_norm_silu, triton_unavailable

if TYPE_CHECKING:
    from svd_ds.model.unet import UNetConfig

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest norm of the difference from float64 over the norm, of a result or a gradient: several times the
rounding of the dtype (of TF32 for float32), far below the error of a wrong kernel."""
FUSED = "fused"
"""Trial of Triton's kernels of model.kernels."""
AUTO_ON_GPUS = ("triton", "flash_attn_3", "sdpa")
"""Backends that `auto` tries on a GPU, best first (docs/numerics.md has the figures)."""
LABELS = {
    FUSED: "Triton's group norm and GEGLU",
    "triton": "Triton's attention",
    "flash_attn_3": "FlashAttention-3",
}
HOPPER = 9
"""Major number of the compute capability of the GPUs that FlashAttention-3 is made for."""
MAX_REASON = 300
"""Largest number of characters of a reason."""

Report = dict[str, str]
"""Trial (FUSED or an attention backend) -> why its kernels cannot be used on a machine, "" if they can."""


@dataclass(frozen=True)
class KernelSettings:
    """Settings of the network that name kernels."""

    kernels: str
    """model.kernels."""
    attention: dict[str, str]
    """Config key -> backend."""
    head_width: int

    @staticmethod
    def read(model: UNetConfig) -> KernelSettings:
        """Return those of a network."""
        keys = ("spatial_attention", "temporal_attention")
        return KernelSettings(
            model.kernels, {f"model.{key}": getattr(model, key) for key in keys}, model.head_width
        )


@dataclass(frozen=True)
class KernelChoice:
    """Kernels of a network on the machines of a run."""

    kernels: str = "auto"
    """Kernels of group norm and GEGLU."""
    attention: Backend = "auto"
    """Backends that `auto` stands for."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: kernels that `auto` does without, and why."""


def run_trials(settings: KernelSettings, device: torch.device, dtype: torch.dtype) -> Report:
    """Try the kernels that a network would use on this machine.

    On a CPU nothing is tried but kernels that are chosen by name, because `auto` takes torch's.

    Args:
        dtype: compute dtype.

    Raises:
        torch.OutOfMemoryError: the GPU has no memory for small tensors, which says nothing about a kernel.
    """
    report: Report = {}
    if settings.kernels == "triton" or (settings.kernels == "auto" and device.type == "cuda"):
        report[FUSED] = try_fused(device, dtype)
    names = dict.fromkeys(settings.attention.values())
    if "auto" in names and device.type == "cuda":
        names |= dict.fromkeys(name for name in AUTO_ON_GPUS if _is_candidate(name, device, dtype))
    for name in names:
        if name != "auto" and (device.type == "cuda" or name in ("triton", *FLASH)):
            report[name] = try_attention(name, device, dtype, settings.head_width)
    return report


def _is_candidate(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `auto` should try a backend: FlashAttention-3 on Hopper, if it is installed."""
    if name != "flash_attn_3":
        return True
    # A package that is not there is no fault; one that cannot be imported is.
    missing = isinstance(import_flash(name), ModuleNotFoundError)
    return dtype in HALF and not missing and torch.cuda.get_device_capability(device)[0] == HOPPER


def choose(settings: KernelSettings, reports: Sequence[tuple[str, Report]]) -> KernelChoice:
    """Choose kernels that work on all machines.

    Args:
        reports: host and report of each rank; the choice is the same wherever they are the same.

    Raises:
        ValueError: a kernel that is chosen by name, or the last one of `auto`, cannot be used.
    """
    if settings.kernels == "triton" and (fault := _fault(FUSED, reports)):
        raise ValueError(f"model.kernels is triton, which cannot be used {fault}: choose auto or torch")
    for key, name in settings.attention.items():
        if name != "auto" and (fault := _fault(name, reports)):
            raise ValueError(f"{key} is {name}, which cannot be used {fault}: choose auto or sdpa")
    tried = {name for _, report in reports for name in report}
    faults = {name: _fault(name, reports) for name in (FUSED, *AUTO_ON_GPUS) if name in tried}
    kernels: str = settings.kernels
    backends: Backend = "auto"
    if kernels == "auto" and FUSED in faults:
        kernels = "torch" if faults[FUSED] else "triton"
    if "auto" in settings.attention.values() and "sdpa" in faults:
        if faults["sdpa"]:
            raise ValueError(
                f"torch's attention, sdpa, cannot be used {faults['sdpa']}: the environment variable "
                "TORCH_CUDNN_SDPA_DEPRIORITIZED=1 avoids cuDNN's"
            )
        backends = tuple(name for name in AUTO_ON_GPUS if faults.get(name) == "")
    return KernelChoice(kernels, backends, _notes(faults))


def choose_on_this_machine(model: UNetConfig, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """Try the kernels of a network, and choose those that work here.

    Raises:
        ValueError: see `choose`.
    """
    settings = KernelSettings.read(model)
    return choose(settings, [("this machine", run_trials(settings, device, dtype))])


def find_kernel_faults(settings: KernelSettings, device: torch.device) -> Report:
    """Try the kernels of a network on this machine, in the dtype that `precision=auto` takes.

    Returns:
        Description of each kernel that cannot be used -> why.
    """
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    report = run_trials(settings, device, torch.bfloat16 if half else torch.float32)
    return {LABELS.get(name, name): fault for name, fault in report.items() if fault}


def _fault(name: str, reports: Sequence[tuple[str, Report]]) -> str:
    """Return where and why a kernel cannot be used; "" if no rank reports a fault of it."""
    # A host has several ranks, which need not agree.
    faults: dict[str, str] = {}
    for host, report in reports:
        if fault := report.get(name, "it is not for the GPU there"):
            faults.setdefault(host, fault)
    if not faults or not any(name in report for _, report in reports):
        return ""
    host, fault = next(iter(faults.items()))
    others = f" and {len(faults) - 1} further hosts" if len(faults) > 1 else ""
    return f"on {host}{others}: {fault}"


def _notes(faults: dict[str, str]) -> tuple[str, ...]:
    replaced: dict[str, list[str]] = {}
    for name, fault in faults.items():
        if fault:
            replaced.setdefault(fault, []).append(LABELS[name])
    return tuple(
        f"torch's kernels replace {' and '.join(labels)}, which cannot be used {fault}"
        for fault, labels in replaced.items()
    )


def try_fused(device: torch.device, dtype: torch.dtype) -> str:
    """Try Triton's group norm with SiLU and GEGLU; return why they cannot be used, "" if they can."""
    try:
        if reason := triton_unavailable(device):
            return f"it {reason}"
    except Exception as error:  # of the import of Triton
        return _describe(error)
    x, weight, bias, proj = _draw((2, 150, 64), (64,), (64,), (20, 320))

    def norm(kernels: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, 32, 1e-5, True, kernels)

    def gate(kernels: str, proj: Tensor) -> Tensor:
        return geglu(proj, kernels)

    return _compare(norm, "triton", "torch", [x + 1, weight, bias], device, dtype) or _compare(
        gate, "triton", "torch", [proj], device, dtype
    )


def try_attention(backend: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Try an attention backend; return why it cannot be used, "" if it can."""
    try:
        if reason := unavailable(backend, device, dtype):
            return f"it {reason}"
    except Exception as error:  # of the import of Triton
        return _describe(error)
    tokens = 14 if backend in ("triton", "short") else 130
    inputs = _draw(*[(2, tokens, 2, head_width)] * 3)

    def run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, name)

    return _compare(run, backend, "reference", inputs, device, dtype)


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    # A generator of its own: a run's random numbers must not depend on trials.
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _compare(
    run: Callable[..., Tensor],
    name: str,
    reference: str,
    inputs: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Compare result and gradients of `run(name, ...)` with those of `run(reference, ...)` in float64."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    exact = _results(functools.partial(run, reference), [tensor.double() for tensor in rounded])
    try:
        found = _results(functools.partial(run, name), [tensor.to(device) for tensor in rounded])
        found = [tensor.cpu() for tensor in found]  # waits for the GPU, whose errors appear here
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and drivers raise anything
        return _describe(error)
    for number, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        difference = ((ours.double() - theirs).norm() / theirs.norm()).item()
        if not difference <= TOLERANCE[dtype]:  # NaN is no success
            what = f"gradient {number}" if number else "result"
            return (
                f"the {what} of a trial differs from float64 by {difference:.2g} of its norm, "
                f"more than {TOLERANCE[dtype]:g}"
            )
    return ""


def _results(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        result = run(*inputs)
        # Whole numbers, which no dtype rounds.
        gradient = (torch.arange(result.numel()) % 7 - 3).view(result.shape).to(result)
        return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def _describe(error: Exception) -> str:
    if isinstance(error, CalledProcessError):
        return f"the C compiler, which needs Python's header files, ends with exit code {error.returncode}"
    words = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return words if len(words) <= MAX_REASON else words[: MAX_REASON - 3] + "..."
