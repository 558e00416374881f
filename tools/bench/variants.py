"""How the benchmarks compare ways of taking the same step: in turn, by time and by memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from cases import DTYPES, Case
from contestant import Contestant, peak_of_step

from svd_ds.model.unet import UNet

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
