"""Measure the cost of checkpoint checksums: their speed, and their share of a save and of a load."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from svd_ds.cli import run_cli
from svd_ds.fsync_io import fsync_path
from svd_ds.training import draft as drafts
from svd_ds.weights.manifest import COMPLETE, FileDigest, Manifest, compute_digest, find_damage, read_manifest
from svd_ds.weights.shards import WeightShards, rank_file_name

EXAMPLE = """example:
  python tools/bench/checksum_cost.py --gb 1.5 --rounds 5

The checkpoint has one rank's slices of --gb in all: weights, both moments and an average, in tensors of 16
MB. Each round saves it as a run does, and loads it with and without verification, in alternating order.
Before each load the files are dropped from the page cache. The overhead is (with - without) / without; the
time of a save without checksums is the time of the save less that in checksums. The output has the median of
the rounds, with the smallest and the largest."""
FOLDERS = ("unet", "adam-exp_avg", "adam-exp_avg_sq", "ema-power-0.050")
NUMEL = 2**22
"""Elements of a tensor."""


class Times(NamedTuple):
    """Wall and processor time, in seconds."""

    wall: float
    processor: float
    """CPU time of all threads, without waiting for the disk: steadier than wall time on a busy machine."""

    @classmethod
    def now(cls) -> Times:
        """Read both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.processor - other.processor)

    def __add__(self, other: tuple[float, ...]) -> Times:  # type: ignore[override]
        return Times(self.wall + other[0], self.processor + other[1])


def main() -> None:
    arguments = parse_arguments()
    num_tensors = max(1, round(arguments.gb * 1e9 / (4 * NUMEL * len(FOLDERS))))
    values = {f"layer{i}": torch.randn(NUMEL) for i in range(num_tensors)}
    tensors = {f"{folder}/{rank_file_name(0, 1)}": values for folder in FOLDERS}
    size = 4 * NUMEL * num_tensors * len(FOLDERS)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        checkpoint = save(folder / "first", tensors)
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores")
        report_speeds(values, checkpoint, size)
        saves, loads = [], []
        for turn in range(arguments.rounds):
            saves.append(time_save(folder / "again", tensors))
            loads.append(pair(turn, lambda checked: time_load(checkpoint, values, checked)))
        report_shares("save", saves)
        report_shares("load", loads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(folder: Path, tensors: drafts.TensorFiles) -> Path:
    """Write a checkpoint as a run does, and return its folder."""
    digests = drafts.write_draft(folder, tensors, {}, {})
    (folder / COMPLETE).write_text(Manifest("bench", 1, True, digests).as_json())
    return folder


def time_save(folder: Path, tensors: drafts.TensorFiles) -> tuple[Times, Times]:
    """Time a save; returns its times, and these less the time in checksums."""
    digesting = Times(0.0, 0.0)

    def timed(path: Path) -> FileDigest:
        nonlocal digesting
        started = Times.now()
        digest = compute_digest(path)
        digesting += Times.now() - started
        return digest

    with patched_digest(timed):
        started = Times.now()
        save(folder, tensors)
        took = Times.now() - started
    shutil.rmtree(folder)
    return took, took - digesting


def time_load(checkpoint: Path, names: Iterable[str], checked: bool) -> Times:
    """Time a load from disk, with verification if `checked`."""
    drop_from_cache(checkpoint)
    started = Times.now()
    if checked and (damage := find_damage(checkpoint, read_manifest(checkpoint))):
        raise ValueError(f"{checkpoint} is damaged: {damage}")
    for folder in FOLDERS:
        files = WeightShards(checkpoint / folder)
        for name in names:
            files.read(name, NUMEL, 0, NUMEL)
    return Times.now() - started


@contextmanager
def patched_digest(digest: Callable[[Path], FileDigest]) -> Iterator[None]:
    """Replace the checksum function of saves in the context."""
    drafts.compute_digest = digest  # type: ignore[assignment]
    yield
    drafts.compute_digest = compute_digest


def drop_from_cache(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fsync_path(path)
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def pair(turn: int, measure: Callable[[bool], Times]) -> tuple[Times, Times]:
    """Measure with and without checksums, in alternating order."""
    if turn % 2 == 0:
        checked = measure(True)
        return checked, measure(False)
    plain = measure(False)
    return measure(True), plain


def report_speeds(values: dict[str, Tensor], checkpoint: Path, size: int) -> None:
    """Print the speeds of checksums."""
    name = f"{FOLDERS[0]}/{rank_file_name(0, 1)}"
    memory = [value.numpy().data for value in values.values()]
    speeds = {
        "in memory, one thread": speed(
            4 * NUMEL * len(memory), lambda: [xxhash.xxh3_128(value).digest() for value in memory]
        ),
        "a file in the page cache, one thread": speed(
            (checkpoint / name).stat().st_size, lambda: compute_digest(checkpoint / name)
        ),
        "verification of the checkpoint in the page cache": speed(
            size, lambda: find_damage(checkpoint, read_manifest(checkpoint))
        ),
    }
    for where, found in speeds.items():
        print(f"| {where} | {found:.1f} GB/s |")


def speed(num_bytes: int, action: Callable[[], object], times: int = 5) -> float:
    """Measure the median speed of an action, in GB/s."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        found.append(num_bytes / 1e9 / (time.perf_counter() - started))
    return statistics.median(found)


def report_shares(operation: str, pairs: list[tuple[Times, Times]]) -> None:
    """Print the overhead of checksums on an operation, save or load."""
    for kind in ("wall", "processor"):
        times = [(getattr(checked, kind), getattr(plain, kind)) for checked, plain in pairs]
        shares = [100 * (checked / plain - 1) for checked, plain in times]
        print(
            f"| {operation}, {kind} time | {statistics.median(plain for _, plain in times):.2f} s without | "
            f"{statistics.median(shares):.0f} % more ({min(shares):.0f} to {max(shares):.0f}) |"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gb", type=float, default=1.5, help="size of the checkpoint in GB; default: %(default)s")
    add("--rounds", type=int, default=5, help="number of rounds; default: %(default)s")
    add("--folder", type=Path, help="folder of the checkpoint; default: the system's temporary folder")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
