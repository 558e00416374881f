"""Fixtures that run the tools in the process of the tests, as their command lines do."""

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


class ToolResult(NamedTuple):
    """Exit code and output of a tool."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a tool: run_tool("name.py", argument, ...) -> exit code."""

    def run(name: str, *arguments: object) -> int:
        # Modules in the script's folder can be imported, as for any script.
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
def tool_output(
    run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Callable[..., ToolResult]:
    """Run a tool and return its exit code and output."""

    def run(name: str, *arguments: object) -> ToolResult:
        code = run_tool(name, *arguments)
        return ToolResult(code, *capsys.readouterr())

    return run


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Fake scontrol.

    scontrol(state) puts a program first in the PATH that reports the job in that state, and returns the file,
    now empty, to which it logs all other requests.
    """

    def put(state: str) -> Path:
        program, log = tmp_path / "scontrol", tmp_path / "log"
        program.write_text(SCONTROL.format(state=state, log=log))
        program.chmod(0o755)
        log.write_text("")
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return log

    return put
