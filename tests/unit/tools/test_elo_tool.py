"""tools/elo.py: one table per axis, one sentence for a bad file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.unit.tools.conftest import ToolResult


def test_each_axis_has_a_table(tmp_path: Path, tool_output: Callable[..., ToolResult]) -> None:
    votes = tmp_path / "votes.csv"
    votes.write_text("first,second,winner,axis\n" + "a,b,a,quality\n" * 30 + "a,b,b,prompt\n" * 30)
    words = tool_output("elo.py", votes).out.split()
    assert words.index("quality") < words.index("a") < words.index("b") < words.index("prompt")
    after = words[words.index("prompt") :]
    assert after.index("b") < after.index("a")


def test_missing_votes_are_one_sentence(tmp_path: Path, tool_output: Callable[..., ToolResult]) -> None:
    result = tool_output("elo.py", tmp_path / "gone.csv")
    assert result.code == 2 and "there are no votes" in result.err
