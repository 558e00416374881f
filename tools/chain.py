"""Run the paper's stages one after another at a tiny size, each initialised from the previous stage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from svd_ds.cli import run_cli
from svd_ds.compose import compose
from svd_ds.fsync_io import replace_file
from svd_ds.parallel.env import Env

EXAMPLE = """examples:
  python tools/chain.py runs/chain
  python tools/chain.py runs/chain --image-model sd21-tiny --orbits data/orbits
  python tools/chain.py runs/chain run.steps=2 batch.size=2

Each stage is its experiment with debug=tiny over it, on one rank, in the run folder OUT/EXPERIMENT, and
starts by init.from. A chain that was stopped resumes where it was.
"""
IMAGE_MODEL, ORBITS = "image-model", "orbits"
CHAIN = {
    "stage1_time_embed": IMAGE_MODEL,
    "stage1": "stage1_time_embed",
    "stage2": "stage1",
    "stage2_highres": "stage2",
    "stage3_t2v": "stage2_highres",
    "stage3_i2v_base": "stage2_highres",
    "stage3_i2v": "stage3_i2v_base",
    "stage3_i2v_xt": "stage3_i2v",
    "interpolation": "stage3_t2v",
    "camera_lora": "stage3_i2v",
    "multiview": "stage3_i2v_xt",
}
"""Experiment -> source of its initial weights."""


def main() -> None:
    arguments = parse_arguments()
    # These import DeepSpeed and diffusers, which takes seconds: --help does not wait for them.
    from tiny.stage_inputs import write_image_model, write_orbits

    from svd_ds.run import run

    image_model = arguments.image_model or make_once(arguments.out / IMAGE_MODEL, write_image_model)
    orbits = arguments.orbits or make_once(arguments.out / ORBITS, write_orbits)
    for experiment, source in CHAIN.items():
        overrides = [
            f"+experiment={experiment}",
            "debug=tiny",
            f"run.dir={arguments.out / experiment}",
            f"data.path={orbits if experiment == 'multiview' else arguments.data}",
            f"init.from={image_model if source == IMAGE_MODEL else arguments.out / source}",
            *arguments.overrides,
        ]
        print(f"\n{experiment}: {' '.join(overrides)}", flush=True)
        run(compose(overrides), Env.read({}))


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder; make it unless an earlier run of the chain has."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        make(part)
        replace_file(part, folder)
    return folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the runs")
    add("overrides", nargs="*", metavar="key=value", help="setting of every stage, such as run.steps=2")
    add("--data", type=Path, default=Path("data/quickstart"), metavar="SHARDS", help="default: %(default)s")
    add(
        "--orbits",
        type=Path,
        metavar="SHARDS",
        help="clips of 21 frames with an elevation; default: OUT/orbits, chequered balls, made here",
    )
    add(
        "--image-model",
        type=Path,
        metavar="UNET",
        help=f"a tiny Stable Diffusion 2; default: OUT/{IMAGE_MODEL}, random weights, made here",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
