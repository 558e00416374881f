"""Time a training step under each policy of activation checkpointing, and the memory that it takes."""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from pathlib import Path

import torch
from bench_cases import DTYPES, Case, Inputs, add_case_options, read_cases
from bench_parts import Contestant

from svd_ds.door import run_door
from svd_ds.model.unet import UNet
from svd_ds.parallel.recompute import POLICIES, apply_recompute

EXAMPLE = """example:
  OMP_NUM_THREADS=2 python tools/bench_recompute.py --size 256x384 --frames 14

A step is forward, backward and AdamW of one clip. The policies take steps in turn; a ratio is the median of a
policy's time over that of none, turn by turn. Memory is the step's peak beyond what stays between steps: on a
GPU what torch allocates, on a CPU what the process holds (Linux)."""
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in read_cases(arguments, ("turns",)):
        compare(case, arguments.turns, device)


def compare(case: Case, turns: int, device: torch.device) -> None:
    """Print the table of one case."""
    inputs = case.inputs(device)
    contestants = {policy: contestant(case, policy, device) for policy in POLICIES}
    peaks = {policy: peak_of_step(contestants[policy], inputs) for policy in POLICIES}
    steps = [[contestants[policy].step(inputs) for policy in POLICIES] for _ in range(turns)]
    widths = ", ".join(map(str, case.widths))
    print(f"\n{case.clip}, widths {widths}, {case.num_tokens} tokens, {case.dtype}, {device.type}\n")
    print("| policy | ms | ratio to none | peak MiB |\n| --- | --- | --- | --- |")
    for policy, seconds in zip(POLICIES, zip(*steps, strict=True), strict=True):
        ratio = statistics.median(own / step[0] for own, step in zip(seconds, steps, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"| {policy} | {milliseconds:.0f} | {ratio:.2f} | {peaks[policy] / 2**20:.0f} |", flush=True)


def contestant(case: Case, policy: str, device: torch.device) -> Contestant:
    torch.manual_seed(0)
    unet = UNet(case.config).to(device, DTYPES[case.dtype])
    apply_recompute(unet, unet.blocks(), policy)
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, size="256x384", frames=14, tokens="1", dtype="fp32")
    add = parser.add_argument
    add("--turns", type=int, default=3, help="of timed steps; default 3")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_door(main)
