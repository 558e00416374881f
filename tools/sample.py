"""Sample videos from a run, a checkpoint or a pipeline folder: MP4 files and a contact sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from svd_ds.diffusion.guidance import KINDS as GUIDANCE_KINDS
from svd_ds.diffusion.samplers import SAMPLERS
from svd_ds.door import run_door
from svd_ds.model.conditioner import ConditionerConfig
from svd_ds.sample import SampleConfig, load_pipeline, sample_video
from svd_ds.video import contact_sheet, read_image, to_uint8, write_mp4

EXAMPLE = """examples:
  python tools/sample.py runs/small --image frame.png --out samples
  python tools/sample.py ~/stable-video-diffusion-img2vid --image a.jpg b.jpg --out samples --steps 25
  python tools/sample.py runs/text --caption "a boat on a lake" --out samples --guidance 7:7
"""


def main() -> None:
    arguments = parse_arguments()
    config = SampleConfig(
        num_steps=arguments.steps,
        sampler=arguments.sampler,
        guidance=arguments.guidance_kind,
        guidance_min=arguments.guidance[0],
        guidance_max=arguments.guidance[1],
        fps=arguments.fps,
        motion_bucket=arguments.motion_bucket,
        augmentation=arguments.augmentation,
        seed=arguments.seed,
    )
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline = load_pipeline(arguments.run, device, dtype, which=arguments.ema, frozen=arguments.frozen)
    height, width = arguments.size or (pipeline.height, pipeline.width)
    num_frames = arguments.frames or pipeline.num_frames
    jobs = make_jobs(arguments, pipeline.conditioner.config, height, width)

    videos = []
    with Progress() as bar:
        task = bar.add_task("sample", total=len(jobs) * config.num_steps)
        for i, (name, first_frame_CHW, caption) in enumerate(jobs):
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
            )
            videos.append(to_uint8(frames_BTCHW[0]))
            write_mp4(videos[-1], arguments.out / f"{i}-{name}.mp4", config.fps)
    contact_sheet(videos, arguments.out / "contact_sheet.png")
    print(
        f"wrote {len(videos)} video{'s' if len(videos) > 1 else ''} and contact_sheet.png to {arguments.out}"
    )


def make_jobs(
    arguments: argparse.Namespace, conditioning: ConditionerConfig, height: int, width: int
) -> list[tuple[str, Tensor, str]]:
    """Name, first frame in [-1, 1] (grey where the network sees none) and caption of each video."""
    takes_image = "image" in (conditioning.context, conditioning.concat)
    takes_text = conditioning.context == "text"
    if (takes_image and not arguments.image) or (takes_text and not arguments.caption):
        options = ["--image"] * takes_image + ["--caption"] * takes_text
        raise ValueError(f"{arguments.run} is conditioned on what you give with {' and '.join(options)}")
    num_videos = len(arguments.image if takes_image else arguments.caption) or 1
    captions = arguments.caption if takes_text else [""] * num_videos
    if len(captions) != num_videos:
        raise ValueError(f"{len(captions)} captions do not go with {num_videos} images")
    if not takes_image:
        return [(f"video-{i}", torch.zeros(3, height, width), captions[i]) for i in range(num_videos)]
    frames = [read_image(path, height, width).float() / 127.5 - 1 for path in arguments.image]
    return list(zip([path.stem for path in arguments.image], frames, captions, strict=True))


def parse_arguments() -> argparse.Namespace:
    defaults = SampleConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint, or a pipeline folder")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help="first frames, one a video")
    add("--caption", nargs="+", default=[], metavar="TEXT", help="for networks that read text, one a video")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the videos go")
    add("--frames", type=int, metavar="T", help="default: what RUN was trained on")
    add("--size", type=size, metavar="HxW", help="default: the run's; 576x1024 for a pipeline folder")
    add("--steps", type=int, default=defaults.num_steps, metavar="N", help="default: %(default)s")
    add("--sampler", choices=list(SAMPLERS), default=defaults.sampler, help="default: %(default)s")
    add("--guidance", type=guidance, default="1:2.5", metavar="MIN:MAX", help="default: %(default)s")
    add("--guidance-kind", choices=GUIDANCE_KINDS, default=defaults.guidance, help="default: %(default)s")
    add("--fps", type=float, default=defaults.fps, help="default: %(default)s")
    add(
        "--motion-bucket",
        type=float,
        default=defaults.motion_bucket,
        metavar="M",
        help="default: %(default)s",
    )
    add(
        "--augmentation",
        type=float,
        default=defaults.augmentation,
        metavar="SIGMA",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    add("--ema", metavar="NAME", help="which average of a run, or raw; default: its first average")
    add("--frozen", metavar="FOLDER", help="where vae/ and the encoders are; default: RUN's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """320x576 -> (320, 576)."""
    height, width = text.split("x")
    return int(height), int(width)


def guidance(text: str) -> tuple[float, float]:
    """1:2.5 -> (1.0, 2.5)."""
    minimum, maximum = text.split(":")
    return float(minimum), float(maximum)


if __name__ == "__main__":
    run_door(main)
