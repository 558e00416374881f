"""The tools, run in the tests' own process as their doors do."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
SCONTROL = """#!/bin/sh
case "$1" in show) echo "JobState={state} ExcNodeList=(null)" ;; *) echo "$@" >> {log} ;; esac
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run_tool("name.py", argument, ...) -> the exit code."""

    def run(name: str, *arguments: object) -> int:
        # As for any script, modules beside it are found.
        monkeypatch.syspath_prepend(str((TOOLS / name).parent))
        monkeypatch.setattr(sys, "argv", [str(TOOLS / name), *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        try:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def tool_says(run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The same with what it printed."""

    def run(name: str, *arguments: object) -> Ended:
        code = run_tool(name, *arguments)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """scontrol(state) puts a program in front of the PATH, for which the job is in that state; the file,
    empty now, in which it notes what else it is asked."""

    def put(state: str) -> Path:
        program, log = tmp_path / "scontrol", tmp_path / "log"
        program.write_text(SCONTROL.format(state=state, log=log))
        program.chmod(0o755)
        log.write_text("")
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return log

    return put
