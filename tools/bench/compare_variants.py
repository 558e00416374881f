"""Comparison of variants of the same training step, by time and by memory; the variants take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from cases import DTYPES, Case
from timed_network import TimedNetwork, measure_step_memory

from svd_ds.model.unet import UNet

Prepare = Callable[[UNet, str], None]
"""(network, variant) -> None: sets up a network for a variant."""


def compare(
    case: Case, variants: tuple[str, ...], prepare: Prepare, turns: int, device: torch.device
) -> None:
    """Print a table of variants.

    Args:
        case: network, clip and precision.
        variants: names; ratios are to the first.
        prepare: sets up a network for a variant.
        turns: timed steps of each variant.
        device: device of the steps.
    """
    inputs = case.inputs(device)
    networks = {variant: build_network(case, variant, prepare, device) for variant in variants}
    peaks = {variant: measure_step_memory(networks[variant], inputs) for variant in variants}
    steps = [[networks[variant].step(inputs) for variant in variants] for _ in range(turns)]
    widths = ", ".join(map(str, case.widths))
    print(f"\n{case.clip}, widths {widths}, {case.num_tokens} tokens, {case.dtype}, {device.type}\n")
    print(f"| variant | ms | ratio to {variants[0]} | peak MiB |\n| --- | --- | --- | --- |")
    for variant, seconds in zip(variants, zip(*steps, strict=True), strict=True):
        ratio = statistics.median(own / step[0] for own, step in zip(seconds, steps, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"| {variant} | {milliseconds:.0f} | {ratio:.2f} | {peaks[variant] / 2**20:.0f} |", flush=True)


def build_network(case: Case, variant: str, prepare: Prepare, device: torch.device) -> TimedNetwork:
    """Build a network with random weights for a variant."""
    torch.manual_seed(0)
    unet = UNet(case.config).to(device, DTYPES[case.dtype])
    prepare(unet, variant)
    return TimedNetwork(unet)
