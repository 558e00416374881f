"""tools/bench/checksum_cost.py from the command line, at a small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.unit.tools.conftest import ToolResult


def test_speeds_and_overheads_are_printed_and_no_file_is_left(
    tool_output: Callable[..., ToolResult], tmp_path: Path
) -> None:
    ended = tool_output("bench/checksum_cost.py", "--gb", 0.05, "--rounds", 2, "--folder", tmp_path)
    assert ended.code == 0, ended.err
    size, *rows = ended.out.splitlines()
    assert size.startswith("0.07 GB")
    assert [row.count("GB/s") for row in rows] == [1, 1, 1, 0, 0, 0, 0]
    assert [row.split(",")[0] for row in rows[3:]] == ["| save", "| save", "| load", "| load"]
    assert list(tmp_path.iterdir()) == []
