"""The benchmarks of recomputation, ZeRO-3 and Triton kernels from the command line, at a tiny size."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from svd_ds.parallel.recompute import POLICIES
from tests.unit.tools.conftest import ToolResult

pytestmark = pytest.mark.slow
TINY = ("--size", "16x16", "--frames", "2", "--widths", "64")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of a process")
def test_every_policy_has_a_row(tool_output: Callable[..., ToolResult]) -> None:
    *_, head, _, none, _, _, _ = lines = tool_output(
        "bench/recompute_policies.py", *TINY, "--turns", 1
    ).out.splitlines()
    assert head.split(" | ")[1:] == ["ms", "ratio to none", "peak MiB |"]
    assert [line.split()[1] for line in lines[-len(POLICIES) :]] == list(POLICIES)
    assert none.split()[5] == "1.00"


def test_one_rank_of_zero_is_timed(
    run_tool: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert run_tool("bench/zero3_overhead.py", *TINY, "--pairs", 1) == 0
    *_, row = capfd.readouterr().out.splitlines()
    assert row.startswith("| 1 x cpu | 64 | 2 x 16x16 | fp32 |")


@pytest.mark.parametrize("tool", ["bench/recompute_policies.py", "bench/zero3_overhead.py"])
def test_invalid_option_is_one_sentence(tool: str, tool_output: Callable[..., ToolResult]) -> None:
    ended = tool_output(tool, "--size", "128")
    assert ended.code == 2
    assert "--size is '128': it must be HEIGHTxWIDTH, multiples of 64 pixels" in ended.err


def test_triton_benchmark_needs_a_gpu(tool_output: Callable[..., ToolResult]) -> None:
    ended = tool_output("bench/triton_kernels.py", *TINY)
    assert ended.code == 2
    assert "needs a GPU and Triton: torch sees no GPU" in ended.err
