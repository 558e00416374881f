"""Compile every kernel of the UNet for GPUs that the machine need not have, and print a report.

    python compiled_kernels.py ARCHITECTURE ...     80: A100, 90: H100

One line of JSON a kernel: its name, the GPU, the number of 16-byte reads, and the bytes of spilled registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from svd_ds.model.ops.attention_triton import short_attention
from svd_ds.model.ops.fused_triton import GEGLU, GroupNormSiLU

CUOBJDUMP = "backends/nvidia/bin/cuobjdump"


def main() -> None:
    JITFunction.__getitem__ = compile_only
    for architecture in map(int, sys.argv[1:]):
        pretend(architecture)
        for dtype in (torch.bfloat16, torch.float32):
            for channels in (320, 2560):
                x = torch.empty(2, 64, channels, dtype=dtype, requires_grad=True)
                weight, bias = torch.empty(2, channels, dtype=dtype)
                GroupNormSiLU.apply(x, weight, bias, 32, 1e-5, True).sum().backward()
            qkv = torch.empty(1, 2, 25, 3, 2, 64, dtype=dtype, requires_grad=True)
            short_attention(qkv).sum().backward()
            GEGLU.apply(torch.empty(64, 2560, dtype=dtype, requires_grad=True)).sum().backward()


def pretend(architecture: int) -> None:
    """Make Triton see a GPU of an architecture, with the architecture as its device number."""
    driver = SimpleNamespace(
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    )
    triton.runtime.driver.set_active(driver)


def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
    """Return a function that compiles `kernel` instead of launching it."""

    def compile_for(*arguments: Any, **options: Any) -> None:
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        report = {
            "name": kernel.fn.__name__,
            "architecture": compiled.metadata.target.arch,
            "wide_reads": compiled.asm["ptx"].count("ld.global.v4"),
            "spilled": spilled(compiled.asm["cubin"]),
        }
        print(json.dumps(report))

    return compile_for


def spilled(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True)
    return max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))


if __name__ == "__main__":
    main()
