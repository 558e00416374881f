"""tools/elo.py: a table a question, one sentence for a bad file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.unit.tools.conftest import Ended


def test_a_table_for_each_question(tmp_path: Path, tool_says: Callable[..., Ended]) -> None:
    votes = tmp_path / "votes.csv"
    votes.write_text("first,second,winner,axis\n" + "a,b,a,quality\n" * 30 + "a,b,b,prompt\n" * 30)
    words = tool_says("elo.py", votes).out.split()
    assert words.index("quality") < words.index("a") < words.index("b") < words.index("prompt")
    after = words[words.index("prompt") :]
    assert after.index("b") < after.index("a")


def test_votes_that_are_gone_are_one_sentence(tmp_path: Path, tool_says: Callable[..., Ended]) -> None:
    ended = tool_says("elo.py", tmp_path / "gone.csv")
    assert ended.code == 2 and "there are no votes" in ended.err
