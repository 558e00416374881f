"""tools/bench/data_loading.py from the command line: it prints the ratios."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.unit.data.test_latents import content_of, numbered, write
from tests.unit.tools.conftest import ToolResult


def test_both_ratios_are_printed(tmp_path: Path, tool_output: Callable[..., ToolResult]) -> None:
    write(tmp_path, {"a": content_of(numbered()), "b": content_of(numbered())})
    ended = tool_output("bench/data_loading.py", tmp_path, "--shape", "3x16x24", "--clips", 2, "--rounds", 3)
    assert ended.code == 0, ended.err
    assert re.search(r"decoding reaches \d+% \(\d+% to \d+%\) of the bare loop", ended.out)
    assert re.search(r"the latent cache gives \d+\.\d \(\d+\.\d to \d+\.\d\) times decoding", ended.out)
