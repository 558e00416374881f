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
FAULTS = """
import ctypes, resource, sys
from svd_ds.cli import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)

def step():
    blocks = [libc.malloc(1 << 20) for _ in range(64)]
    for block in blocks:
        libc.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(block)

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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
def test_unwritable_output_does_not_stop_a_command(tmp_path: Path, kind: str) -> None:
    """Examples: `launch.py ... | head`, a `tee` that was killed, `> log` on a full disk."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_allocator_keeps_freed_memory_for_the_next_step() -> None:
    def pages(what: str) -> int:
        command = [sys.executable, "-c", FAULTS, what]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 100 < 1000 < pages("leave")
