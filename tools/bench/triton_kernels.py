"""Measure time and memory of a training step with Triton's kernels and with torch's."""

from __future__ import annotations

import argparse

import torch
from cases import add_case_options, read_cases
from compare_variants import compare

from svd_ds.cli import run_cli
from svd_ds.model.layers import choose_kernels
from svd_ds.model.ops.fused import triton_installed
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.parallel.recompute import apply_recompute

EXAMPLE = """example:
  python tools/bench/triton_kernels.py --size 256x384,320x576 --dtype bf16,fp32

A step is forward, backward and AdamW of one clip, with recomputation of each block. Group norm and GEGLU are
Triton's or torch's; the rest is the same. The two take turns; the ratio is the median of Triton's time over
torch's, turn by turn. Memory is the peak of a step beyond the state between steps."""


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available() or not triton_installed():
        missing = "Triton is not installed" if torch.cuda.is_available() else "torch sees no GPU"
        raise ValueError(f"this benchmark needs a GPU and Triton: {missing}")
    for case in read_cases(arguments, ("turns",)):
        compare(case, ("torch", "triton"), prepare, arguments.turns, torch.device("cuda"))


def prepare(unet: UNet, kernels: str) -> None:
    choose_kernels(unet, kernels)
    apply_recompute(unet, unet.blocks(), "blocks")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, size="320x576", frames=14, tokens="1", dtype="bf16")
    parser.set_defaults(widths=",".join(map(str, UNetConfig.widths)))
    add = parser.add_argument
    add("--turns", type=int, default=9, help="timed steps of each kind; default 9")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
