"""Compare the training step of our network with diffusers', and print a Markdown table."""

from __future__ import annotations

import argparse
import platform
import statistics

import torch
from against_diffusers import Comparison, both_forward_flops, matmul_peak, measure
from cases import add_case_options, read_cases, read_numbers
from rich.console import Console
from rich.progress import Progress

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.model.unet import UNetConfig
from svd_ds.parallel.recompute import POLICIES

EXAMPLE = """examples:
  OMP_NUM_THREADS=2 python tools/bench/train_step.py
  python tools/bench/train_step.py --size 128x192 --frames 8 --tokens 77 --dtype fp32 --recompute blocks
  python tools/bench/train_step.py --full
  python tools/bench/train_step.py --flops

A step is forward, backward and AdamW on float32 master weights, as in training. Both networks have the same
weights and take turns; the ratio is the median of diffusers' time over ours, pair by pair, with the smallest
and the largest. diffusers runs in the faster of two memory formats. MFU is 3 x the operations of the
network's own forward / (time of a step x the operations per second of a matrix product, measured first). Peak
memory is that of weights, the optimiser's moments and a step."""
HEADER = (
    "clip",
    "tokens",
    "dtype",
    "batch",
    "ms ours",
    "ms diffusers",
    "ratio",
    "TFLOP forward",
    "MFU",
    "peak GiB",
)
RELEASED = {
    "size": "256x384,320x576,576x1024,25x576x1024",
    "widths": ",".join(map(str, UNetConfig.widths)),
    "dtype": "bf16",
    "batch": "largest",
    "recompute": "blocks",
}
"""Options of --full."""


def main() -> None:
    keep_freed_memory()
    arguments = parse_arguments()
    batch = None if arguments.batch == "largest" else read_numbers("batch", arguments.batch)[0]
    cases = read_cases(arguments, ("pairs",), recompute=arguments.recompute, batch=batch)
    if arguments.flops:
        print_row("clip", "tokens", "TFLOP forward, ours", "diffusers'")
        print_row(*["---"] * 4)
        for case in cases:
            print_row(case.clip, case.num_tokens, *(f"{n / 1e12:.2f}" for n in both_forward_flops(case)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {dtype: matmul_peak(dtype, device) for dtype in dict.fromkeys(case.dtype for case in cases)}
    print(describe_machine(device, peaks), end="\n\n")
    print_row(*HEADER)
    print_row(*["---"] * len(HEADER))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=len(cases) * arguments.pairs)
        for index, case in enumerate(cases):
            result = measure(case, arguments.pairs, device, lambda: progress.advance(task))
            progress.update(task, completed=(index + 1) * arguments.pairs)
            if result is None:
                print_row(case.clip, case.num_tokens, case.dtype, "does not fit this GPU")
            else:
                print_comparison(result, peaks[case.dtype])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_case_options(parser, size="256x384", frames=14, tokens="77,1", dtype="fp32,bf16")
    add = parser.add_argument
    add("--batch", default="1", help="clips in a step, or largest: as many as fit the GPU; default 1")
    add(
        "--recompute",
        default="none",
        choices=POLICIES,
        help="recompute policy of our network; diffusers uses its own, unless none",
    )
    add("--pairs", type=int, default=5, help="timed pairs of steps; default 5")
    add("--full", action="store_true", help="time the released network at its sizes in bf16, on a GPU")
    add(
        "--flops",
        action="store_true",
        help="only count the operations of the released network",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    presets, _ = parser.parse_known_args()
    if presets.full:
        parser.set_defaults(**RELEASED)
    elif presets.flops:
        parser.set_defaults(widths=RELEASED["widths"], dtype="fp32")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.flops:
        for option, is_set in (("--full", arguments.full), ("--batch largest", arguments.batch == "largest")):
            if is_set:
                raise ValueError(f"{option} needs a GPU, but torch {torch.__version__} sees none")
    return arguments


def print_comparison(result: Comparison, peak: float) -> None:
    """Print a row of the table; `peak` is in operations per second."""
    case, ratios = result.case, result.ratios
    ours, theirs = result.medians
    batch = str(case.batch)
    if result.largest_batch is not None:
        batch += f" ({' / '.join(map(str, result.largest_batch))} fit)"
    cells = [
        *(case.clip, case.num_tokens, case.dtype, batch),
        *(f"{1e3 * ours:.0f}", f"{1e3 * theirs:.0f} ({result.memory_format})"),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        " / ".join(f"{flops / 1e12:.3g}" for flops in result.flops),
        " / ".join(f"{share:.0%}" for share in result.mfu(peak)),
        " / ".join(f"{size / 2**30:.1f}" for size in result.peak_bytes),
    ]
    print_row(*cells)


def print_row(*cells: object) -> None:
    """Print a row of the table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def describe_machine(device: torch.device, peaks: dict[str, float]) -> str:
    """Describe the device; `peaks` maps data types to operations per second of a matrix product."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    fastest = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix product: {fastest}"


if __name__ == "__main__":
    run_cli(main)
