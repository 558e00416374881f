"""How the benchmarks compare ways of taking the same step: in turn, by time and by memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from bench_cases import DTYPES, Case, Inputs
from bench_parts import Contestant

from svd_ds.model.unet import UNet

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)


Prepare = Callable[[UNet, str], None]


def compare(case: Case, ways: tuple[str, ...], prepare: Prepare, turns: int, device: torch.device) -> None:
    """Print a table of the ways; `prepare` puts one on a network. Ratios are to the first."""
    inputs = case.inputs(device)
    contestants = {way: contestant(case, way, prepare, device) for way in ways}
    peaks = {way: peak_of_step(contestants[way], inputs) for way in ways}
    steps = [[contestants[way].step(inputs) for way in ways] for _ in range(turns)]
    widths = ", ".join(map(str, case.widths))
    print(f"\n{case.clip}, widths {widths}, {case.num_tokens} tokens, {case.dtype}, {device.type}\n")
    print(f"| way | ms | ratio to {ways[0]} | peak MiB |\n| --- | --- | --- | --- |")
    for way, seconds in zip(ways, zip(*steps, strict=True), strict=True):
        ratio = statistics.median(own / step[0] for own, step in zip(seconds, steps, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"| {way} | {milliseconds:.0f} | {ratio:.2f} | {peaks[way] / 2**20:.0f} |", flush=True)


def contestant(case: Case, way: str, prepare: Prepare, device: torch.device) -> Contestant:
    torch.manual_seed(0)
    unet = UNet(case.config).to(device, DTYPES[case.dtype])
    prepare(unet, way)
    return Contestant(unet)


def peak_of_step(contestant: Contestant, inputs: Inputs) -> int:
    """Bytes of a second step, when the optimiser's averages are there."""
    contestant.step(inputs)
    gc.collect()
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        contestant.step(inputs)
        return contestant.peak_bytes - before
    # What the allocator keeps of freed memory would count as held.
    ctypes.CDLL(None).malloc_trim(0)
    before = held_bytes("VmRSS")
    CLEAR_REFS.write_text(RESET_PEAK)
    contestant.step(inputs)
    return held_bytes("VmHWM") - before


def held_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
