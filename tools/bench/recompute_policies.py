"""Measure time and memory of a training step under each policy of activation checkpointing."""

from __future__ import annotations

import argparse

import torch
from cases import add_case_options, read_cases
from compare_variants import compare

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.model.unet import UNet
from svd_ds.parallel.recompute import POLICIES, apply_recompute

EXAMPLE = """example:
  OMP_NUM_THREADS=2 python tools/bench/recompute_policies.py --size 256x384 --frames 14

A step is forward, backward and AdamW of one clip. The policies take turns; a ratio is the median of a
policy's time over that of the policy none, turn by turn. Memory is the peak of a step beyond the state
between steps: the memory that torch allocates on a GPU, or the resident memory of the process on a CPU
(Linux)."""


def main() -> None:
    keep_freed_memory()
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in read_cases(arguments, ("turns",)):
        compare(case, POLICIES, prepare, arguments.turns, device)


def prepare(unet: UNet, policy: str) -> None:
    apply_recompute(unet, unet.blocks(), policy)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, size="256x384", frames=14, tokens="1", dtype="fp32")
    add = parser.add_argument
    add("--turns", type=int, default=3, help="timed steps of each policy; default 3")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
