"""Plan a run before it is queued: does it fit the GPUs, how fast is it, and what does it cost."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from svd_ds import compose
from svd_ds.cli import print_line, run_cli
from svd_ds.config import RunConfig
from svd_ds.plan.hardware import GB, GPUS, Cluster, find_gpu
from svd_ds.plan.planner import make_plan
from svd_ds.plan.report import as_json, as_text
from svd_ds.plan.requests import profile_gpu_steps

EXAMPLE = """examples:
  python tools/plan.py +experiment=stage3_i2v_xt --gpus 64
  python tools/plan.py +experiment=stage2 batch.micro=auto --gpus 384 --gpu h100-80 --price 2.5
  python tools/plan.py +experiment=camera_lora recompute=none --gpus 8 --gpu 4090 --json

Overrides are those of the training. Paths that an experiment requires may be left out: a plan reads neither
data nor weights. The frozen networks have the shapes of a local frozen.path, otherwise those of the public
ones. No GPU is used.

Exit code: 0 if the run fits, 2 with one sentence if its tensors need more memory than a GPU has."""
PLACEHOLDER = "planned"
"""Value of the paths that are left out."""


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    gpu = find_gpu(options.gpu)
    interconnect = options.interconnect * GB if options.interconnect is not None else gpu.node_network
    cluster = Cluster(gpu, options.gpus, options.gpus_per_node, interconnect)
    plan = make_plan(read_config(options.overrides), cluster, profile_gpu_steps, price=options.price)
    print_line(json.dumps(as_json(plan), indent=2) if options.json else as_text(plan))
    plan.check_fits()


def read_config(overrides: Sequence[str]) -> RunConfig:
    """Compose the config of a run, with a placeholder for each path that is left out.

    Raises:
        ValueError: an override is wrong.
    """
    try:
        return compose.compose(overrides, placeholder=PLACEHOLDER)
    except compose.COMPOSE_ERRORS as error:
        raise ValueError(compose.explain(error)) from None


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; overrides may be anywhere among the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="OVERRIDE", help="argument of python -m svd_ds.train")
    add("--gpus", type=_count, required=True, metavar="N", help="GPUs of the run, one per rank")
    add("--gpus-per-node", type=_count, default=8, metavar="N", help="default: %(default)s")
    add("--gpu", default="a100-80", metavar="NAME", help=f"{', '.join(GPUS)}; default: %(default)s")
    add(
        "--interconnect",
        type=_positive,
        metavar="GB/S",
        help="network of a node in one direction; default: eight 200 or 400 Gb/s cards for A100 and H100, "
        "one of 100 Gb/s for cards without NVLink",
    )
    add("--price", type=_positive, metavar="USD", help="of a GPU for an hour")
    add("--json", action="store_true", help="print one JSON document: bytes and seconds")
    add("--debug", action="store_true", help="show the traceback of an error")
    is_override = ["=" in word and not word.startswith("-") for word in words]
    overrides = [word for word, flag in zip(words, is_override, strict=True) if flag]
    return parser.parse_args(
        [*overrides, *(word for word, flag in zip(words, is_override, strict=True) if not flag)]
    )


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


if __name__ == "__main__":
    run_cli(main)
