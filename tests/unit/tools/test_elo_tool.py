"""tools/elo.py: a table a question, one sentence for a bad file."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "elo.py"


def test_a_table_for_each_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = tmp_path / "votes.csv"
    votes.write_text("first,second,winner,axis\n" + "a,b,a,quality\n" * 30 + "a,b,b,prompt\n" * 30)
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(votes)])
    runpy.run_path(str(TOOL), run_name="__main__")
    words = capsys.readouterr().out.split()
    assert words.index("quality") < words.index("a") < words.index("b") < words.index("prompt")
    after = words[words.index("prompt") :]
    assert after.index("b") < after.index("a")

    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "gone.csv")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 2 and "there are no votes" in capsys.readouterr().err
