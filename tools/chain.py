"""The paper's stages one after another, minutes-small, each from the run of the one before."""

from __future__ import annotations

import argparse
from pathlib import Path

from svd_ds.config import compose
from svd_ds.door import run_door
from svd_ds.parallel.env import Env

EXAMPLE = """examples:
  python tools/chain.py runs/chain
  python tools/chain.py runs/chain --image-model sd21-tiny --orbits data/orbits
  python tools/chain.py runs/chain run.steps=2 batch.size=2

Each stage is its experiment with debug=tiny laid over it, and its run is OUT/EXPERIMENT. It starts by
init.from, on one rank. A chain that was stopped goes on where it was.
"""
IMAGE_MODEL, ORBITS = "stage1_time_embed", "multiview"
CHAIN = {
    IMAGE_MODEL: None,
    "stage1": IMAGE_MODEL,
    "stage2": "stage1",
    "stage2_highres": "stage2",
    "stage3_t2v": "stage2_highres",
    "stage3_i2v_base": "stage2_highres",
    "stage3_i2v": "stage3_i2v_base",
    "stage3_i2v_xt": "stage3_i2v",
    "interpolation": "stage3_t2v",
    "camera_lora": "stage3_i2v",
    ORBITS: "stage3_i2v_xt",
}
"""Experiment -> the one it starts from."""


def main() -> None:
    arguments = parse_arguments()
    from svd_ds.run import run  # with DeepSpeed, which takes seconds: --help does not wait for it

    for experiment, overrides in stages(arguments).items():
        print(f"\n{experiment}: {' '.join(overrides)}", flush=True)
        run(compose(overrides), Env.read({}))


def stages(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Experiment -> what stands on the command line of its run, in order."""
    chosen = {}
    for experiment, before in CHAIN.items():
        if experiment == IMAGE_MODEL and arguments.image_model is None:
            continue
        if experiment == ORBITS and arguments.orbits is None:
            continue
        start = arguments.out / before if before in chosen else arguments.image_model
        data = arguments.orbits if experiment == ORBITS else arguments.data
        chosen[experiment] = [
            f"+experiment={experiment}",
            "debug=tiny",
            f"run.dir={arguments.out / experiment}",
            f"data.path={data}",
            f"init.from={start or 'null'}",
            *arguments.overrides,
        ]
    return chosen


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="the folder of the runs")
    add("overrides", nargs="*", metavar="key=value", help="for every stage, such as run.steps=2")
    add("--data", type=Path, default=Path("data/quickstart"), metavar="SHARDS", help="default: %(default)s")
    add(
        "--orbits",
        type=Path,
        metavar="SHARDS",
        help="clips with an elevation, of 21 frames; default: no multiview",
    )
    add(
        "--image-model",
        type=Path,
        metavar="UNET",
        help=f"a tiny Stable Diffusion 2; default: no {IMAGE_MODEL}",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_door(main)
