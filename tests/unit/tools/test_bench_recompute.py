"""tools/bench_recompute.py and tools/bench_zero.py from the command line, at a tiny size."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from svd_ds.parallel.recompute import POLICIES

TOOLS = Path(__file__).parents[3] / "tools"
pytestmark = pytest.mark.slow
TINY = ("--size", "16x16", "--frames", "2", "--widths", "64")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(TOOLS / name), run_name="__main__")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process's memory")
def test_every_policy_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench_recompute.py", monkeypatch, *TINY, "--turns", "1")
    *_, head, _, none, _, _, _ = lines = capsys.readouterr().out.splitlines()
    assert head.split(" | ")[1:] == ["ms", "ratio to none", "peak MiB |"]
    assert [line.split()[1] for line in lines[-len(POLICIES) :]] == list(POLICIES)
    assert none.split()[5] == "1.00"


def test_one_rank_of_zero_is_timed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    run("bench_zero.py", monkeypatch, *TINY, "--pairs", "1")
    *_, row = capfd.readouterr().out.splitlines()
    assert row.startswith("| 1 x cpu | 64 | 2 x 16x16 | fp32 |")


@pytest.mark.parametrize("tool", ["bench_recompute.py", "bench_zero.py"])
def test_a_mistake_is_one_sentence(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(tool, monkeypatch, "--size", "128")
    assert end.value.code == 2
    assert "--size is '128': give HEIGHTxWIDTH, multiples of 64 pixels here" in capsys.readouterr().err
