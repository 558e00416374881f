"""tools/bench_data.py from the command line: it measures, and tells the ratios."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.unit.data.test_latents import content_of, numbered, write

TOOL = Path(__file__).parents[3] / "tools" / "bench_data.py"


def test_it_tells_both_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"a": content_of(numbered()), "b": content_of(numbered())})
    arguments = [str(TOOL), str(tmp_path), "--shape", "3x16x24", "--clips", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(TOOL), run_name="__main__")
    told = capsys.readouterr().out
    assert re.search(r"decoding reaches \d+% of the bare loop", told)
    assert re.search(r"the latent cache gives \d+\.\d times decoding", told)
