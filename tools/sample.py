"""Sample videos from a run, a checkpoint or a pipeline folder: MP4 files and a contact sheet.

Options that are not given are those of the run's own previews; for public weights, those of the released SVD.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from svd_ds.cli import print_line, run_cli
from svd_ds.diffusion.guidance import KINDS as GUIDANCE_KINDS
from svd_ds.diffusion.samplers import SAMPLERS
from svd_ds.model.conditioner import ConditionerConfig
from svd_ds.parallel.devices import check_gpus_are_usable, num_gpus
from svd_ds.sample import SampleConfig, load_pipeline, sample_video
from svd_ds.scalars import RELEASED_SCALARS, SCALARS
from svd_ds.video import contact_sheet, from_uint8, read_image, to_uint8, write_mp4

EXAMPLE = """examples:
  python tools/sample.py runs/small --image frame.png --out samples
  python tools/sample.py ~/stable-video-diffusion-img2vid --image a.jpg b.jpg --out samples --steps 25
  python tools/sample.py runs/interpolation --image a.png --last-image b.png --out samples --guidance 1:1
  python tools/sample.py ~/svd-xt --lora pytorch_lora_weights.safetensors --image a.jpg --out samples
  python tools/sample.py runs/text --caption "a boat on a lake" --out samples --guidance 7:7
"""


def main() -> None:
    arguments = parse_arguments()
    if arguments.device is None:
        check_gpus_are_usable()
    device = torch.device(arguments.device or ("cuda" if num_gpus() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lora = (arguments.lora, arguments.lora_scale) if arguments.lora else None
    pipeline = load_pipeline(arguments.run, device, dtype, arguments.ema, arguments.frozen, lora)
    for note in pipeline.notes:
        print_line(note)
    conditioning = pipeline.conditioner.config
    config = replace(pipeline.sampling, **sampling_options(arguments, conditioning, pipeline.sampling))
    height, width = arguments.size or (pipeline.height, pipeline.width)
    num_frames = arguments.frames or pipeline.num_frames
    requests = make_requests(arguments, conditioning, height, width)

    videos = []
    with Progress() as bar:
        task = bar.add_task("sample", total=len(requests) * config.num_steps)
        for i, (name, first_frame_CHW, last_frame_CHW, caption) in enumerate(requests):
            frames_BTCHW = sample_video(
                pipeline.unet,
                pipeline.autoencoder,
                pipeline.conditioner,
                first_frame_CHW[None].to(device),
                num_frames,
                config,
                captions=[caption],
                ordinals=[i],
                progress=lambda step: bar.advance(task),
                last_frame=last_frame_CHW[None].to(device),
            )
            videos.append(to_uint8(frames_BTCHW[0]))
            write_mp4(videos[-1], arguments.out / f"{i}-{name}.mp4", config.fps)
    contact_sheet(videos, arguments.out / "contact_sheet.png")
    print(
        f"wrote {len(videos)} video{'s' if len(videos) > 1 else ''} and contact_sheet.png to {arguments.out}"
    )


def sampling_options(
    arguments: argparse.Namespace, conditioning: ConditionerConfig, sampling: SampleConfig
) -> dict[str, Any]:
    """Return the fields of SampleConfig that the command line sets.

    Raises:
        ValueError: a scalar is given that the network does not take.
    """
    given = {name: getattr(arguments, name, None) for name in (entry.name for entry in fields(SampleConfig))}
    scalars = dict(arguments.scalar)
    if arguments.elevation is not None:
        scalars["elevation"] = arguments.elevation
    for name in scalars:
        if name in SCALARS and name not in conditioning.scalars:
            raise ValueError(
                f"{arguments.run} takes no scalar {name}; it takes {', '.join(conditioning.scalars)}"
            )
    given |= {name: scalars.pop(name) for name in RELEASED_SCALARS if name in scalars}
    given["scalars"] = sampling.scalars | scalars
    if arguments.guidance_scale is not None:
        given["guidance_min"], given["guidance_max"] = arguments.guidance_scale
    return {name: value for name, value in given.items() if value is not None}


def make_requests(
    arguments: argparse.Namespace, conditioning: ConditionerConfig, height: int, width: int
) -> list[tuple[str, Tensor, Tensor, str]]:
    """Return name, first and last frame in [-1, 1] (grey if the network does not use it) and caption of each
    video.

    Raises:
        ValueError: an option is missing, unused by the network, or has another number of values than the
            others.
    """
    takes_first = conditioning.uses_last_frame or "image" in (conditioning.context, conditioning.concat)
    options = {
        "--image": (takes_first, arguments.image),
        "--last-image": (conditioning.uses_last_frame, arguments.last_image),
        "--caption": (conditioning.context == "text", arguments.caption),
    }
    given = {option: values for option, (takes, values) in options.items() if takes}
    if not all(given.values()):
        raise ValueError(f"{arguments.run} needs {' and '.join(given)}")
    for option, (takes, values) in options.items():
        if values and not takes:
            raise ValueError(f"{arguments.run} takes no {option}")
    if len({len(values) for values in given.values()}) > 1:
        counts = " and ".join(f"{len(values)} with {option}" for option, values in given.items())
        raise ValueError(f"each video needs one value of each option, but there are {counts}")
    num_videos = len(next(iter(given.values()), [""]))

    def read(paths: list[Path]) -> list[Tensor]:
        frames = [from_uint8(read_image(path, height, width)) for path in paths]
        return frames or [torch.zeros(3, height, width)] * num_videos

    names = [path.stem for path in arguments.image] or [f"video-{i}" for i in range(num_videos)]
    captions = arguments.caption or [""] * num_videos
    return list(zip(names, read(arguments.image), read(arguments.last_image), captions, strict=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, checkpoint or pipeline folder")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help="first frames, one per video")
    add("--last-image", type=Path, nargs="+", default=[], metavar="FILE", help="last frames, to interpolate")
    add("--caption", nargs="+", default=[], metavar="TEXT", help="for text-to-video, one per video")
    add("--out", type=Path, required=True, metavar="FOLDER", help="output folder of the videos")
    add("--frames", type=int, metavar="T", help="number of frames; default: as in training")
    add("--size", type=parse_size, metavar="HxW", help="default: as in training; for a pipeline 576x1024")
    add("--steps", type=int, dest="num_steps", metavar="N", help="number of sampling steps")
    add("--sampler", choices=list(SAMPLERS), help="sampler")
    add("--sigma-min", type=float, metavar="SIGMA", help="last noise level before 0")
    add("--sigma-max", type=float, metavar="SIGMA", help="first noise level")
    add(
        "--guidance",
        type=parse_guidance,
        dest="guidance_scale",
        metavar="MIN:MAX",
        help="guidance scale over the frames",
    )
    add("--guidance-kind", choices=GUIDANCE_KINDS, dest="guidance", help="schedule of the scale")
    add("--fps", type=float, help="frames per second")
    add("--motion-bucket", type=float, metavar="M", help="amount of motion, 0 to 255")
    add("--augmentation", type=float, metavar="SIGMA", help="noise level of the conditioning frames")
    add("--elevation", type=float, metavar="DEGREES", help="short for --scalar elevation=DEGREES")
    add(
        "--scalar",
        type=parse_scalar,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any scalar condition of the network (svd_ds/scalars.py); may be repeated",
    )
    add("--seed", type=int, help="seed of the initial noise")
    add(
        "--ema",
        metavar="NAME",
        help="average of a run, EMA length (0.07), or raw; default: its first average",
    )
    add("--frozen", metavar="FOLDER", help="folder with vae/ and the encoders; default: RUN's own")
    add("--lora", type=Path, metavar="FILE", help="LoRA file to merge into the weights")
    add("--lora-scale", type=float, default=1.0, metavar="S", help="factor of the LoRA; default: %(default)s")
    add("--device", help="default: cuda, or cpu on a machine without GPUs")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    """Parse 320x576 to (320, 576)."""
    height, width = text.split("x")
    return int(height), int(width)


def parse_guidance(text: str) -> tuple[float, float]:
    """Parse 1:2.5 to (1.0, 2.5)."""
    minimum, maximum = text.split(":")
    return float(minimum), float(maximum)


def parse_scalar(text: str) -> tuple[str, float]:
    """Parse elevation=20 to ("elevation", 20.0)."""
    name, value = text.split("=")
    return name, float(value)


if __name__ == "__main__":
    run_cli(main)
