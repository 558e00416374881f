from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from svd_ds.cli import open_console, print_error, print_line
console = open_console()
for step in range(200):
    console.print("x" * 100)
print_line("a line")
print_error(ValueError("a sentence"))
open(sys.argv[1], "w").write("reached")
"""


def run(tmp_path: Path, stdout: int, stderr: int) -> int:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "end")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=stderr,
    ).returncode


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_console_that_nobody_reads_ends_no_command(tmp_path: Path, kind: str) -> None:
    """As in `launch.py ... | head`, with a dead `tee`, or `> log` on a full disk."""
    if kind == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        assert run(tmp_path, writer, writer) == 0
    finally:
        os.close(writer)
    assert (tmp_path / "end").read_text() == "reached"
