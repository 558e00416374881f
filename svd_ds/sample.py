"""From a first frame, or a caption, to a video.

    first frame -> Conditioning    (clean to CLIP; noised, encoded, repeated to all frames; scalars)
    or both ends                   (likewise, each in its own place: the network interpolates)
    noise -> latents               (a guided denoiser, Euler or Heun down the sigmas)
    latents -> frames              (the decoder)

Shape legend: B videos, T frames, C channels, H x W pixels, h x w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd_ds.diffusion.denoiser import Network, denoise
from svd_ds.diffusion.draws import draw
from svd_ds.diffusion.guidance import KINDS, guidance_scale, guided
from svd_ds.diffusion.noise import karras_sigmas
from svd_ds.diffusion.samplers import SAMPLERS, Progress
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.unet import UNet
from svd_ds.settings import INT64_MAX, Settings, choice, number
from svd_ds.small_files import read_yaml
from svd_ds.weights.io import load_unet, merge_lora_file

TINY = Path(__file__).parent / "assets" / "tiny_svd"
"""The frozen parts that ship with the package: what a run calls frozen.path=tiny."""
RELEASED_SIZE = (576, 1024)
"""Height and width of the public SVD and SVD-XT, whose folders do not say it."""


def frozen_folder(path: str) -> str:
    """What a setting like `frozen.path` means: a folder, a hub id, or `tiny` for the parts that ship."""
    return str(TINY) if path == "tiny" else path


@dataclass(frozen=True)
class SampleConfig(Settings, section="sampling"):
    """How to sample. The defaults are the released SVD's (Stability-AI/generative-models
    simple_video_sample.py)."""

    num_steps: int = number(25, ge=1, le=10_000)
    sampler: str = choice("euler", SAMPLERS)
    """euler (one network call a step) or heun (two)."""
    sigma_min: float = number(0.002, ge=1e-6, le=1e6)
    sigma_max: float = number(700.0, ge=1e-6, le=1e6)
    rho: float = number(7.0, ge=1, le=100)
    """Exponent of the ladder of sigmas (arXiv 2206.00364 equation 5); 1 spaces them evenly."""
    guidance: str = choice("linear", KINDS)
    """constant, linear or triangle over the frames."""
    guidance_min: float = number(1.0, ge=-1000, le=1000)
    """Scale at the first frame; a constant guidance has only the maximum."""
    guidance_max: float = number(2.5, ge=-1000, le=1000)
    fps: float = number(7.0, ge=0.01, le=1000, hint="conf/train.yaml takes data.fps")
    """Of the video. The network is told fps - 1, as in training: the 6 of simple_video_sample.py."""
    motion_bucket: float = number(127.0, ge=0, le=255)
    """0 to 255: how much should move."""
    augmentation: float = number(0.02, ge=0, le=1000)
    """Sigma of the noise put on the given frames."""
    elevation: float = number(10.0, ge=-90, le=90)
    """Of the camera, in degrees, for networks that orbit an object; the default is SV3D's (there as well)."""
    seed: int = number(0, ge=0, le=INT64_MAX)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sampling.sigma_min is {self.sigma_min}: it must be below sampling.sigma_max, "
                f"{self.sigma_max}"
            )


@torch.no_grad()
def sample_video(
    net: Network,
    autoencoder: Autoencoder,
    conditioner: Conditioner,
    first_frame_BCHW: Tensor,
    num_frames: int,
    config: SampleConfig,
    captions: Sequence[str] | None = None,
    ordinals: Sequence[int] | None = None,
    progress: Progress | None = None,
    last_frame_BCHW: Tensor | None = None,
    context_BLD: Tensor | None = None,
) -> Tensor:
    """Sample a video for each first frame: (B, T, 3, H, W), float32 in [-1, 1].

    first_frame_BCHW: in [-1, 1], on the network's device. It gives the video its size, and where the
    conditioner takes text alone, nothing else. last_frame_BCHW: likewise, needed where the conditioner takes
    both ends of a clip, and not looked at elsewhere. context_BLD: as `Conditioner` takes it. captions: one a
    video, none by default. ordinals: which of the seed's noises each video starts from, the first B by
    default.

    Raises ValueError for a size that is no multiple of the autoencoder's cells, too few frames, or a last
    frame that is missing.
    """
    batch_size, _, height, width = first_frame_BCHW.shape
    cell, device = autoencoder.downsampling, first_frame_BCHW.device
    if height % cell or width % cell:
        raise ValueError(
            f"a video of {height}x{width} pixels cannot be sampled: both must be multiples of {cell}"
        )
    if num_frames < 1:
        raise ValueError(f"a video of {num_frames} frames cannot be sampled: it needs at least 1")
    latent_shape = (num_frames, autoencoder.latent_channels, height // cell, width // cell)
    given_shape = conditioner.noise_shape(autoencoder, height, width)
    draws = draw(config.seed, ordinals or range(batch_size), latent_shape, given_shape, device)

    def every_video(value: float) -> Tensor:
        return torch.full((batch_size,), value, device=device)

    cond = conditioner(
        autoencoder,
        first_frame_BCHW=first_frame_BCHW,
        captions=captions or [""] * batch_size,
        num_frames=num_frames,
        fps_B=every_video(config.fps),
        motion_bucket_B=every_video(config.motion_bucket),
        augmentation_sigma_B=every_video(config.augmentation),
        elevation_B=every_video(config.elevation),
        noise_BKCHW=draws.given_noise_BKCHW,
        last_frame_BCHW=last_frame_BCHW,
        context_BLD=context_BLD,
    )
    scale_T = guidance_scale(config.guidance, config.guidance_min, config.guidance_max, num_frames)
    guided_denoise = guided(partial(denoise, net), scale_T)
    sigmas = karras_sigmas(config.num_steps, config.sigma_min, config.sigma_max, config.rho)
    start_BTChw = draws.noise_BTChw * math.sqrt(1 + sigmas[0].item() ** 2)
    latents_BTChw = SAMPLERS[config.sampler](
        lambda x, sigma_B: guided_denoise(x, sigma_B, cond), start_BTChw, sigmas, progress
    )
    return autoencoder.decode(latents_BTChw)


@dataclass(frozen=True)
class Pipeline:
    """All that sampling needs, the shape that the network was trained on, and how it is sampled."""

    unet: UNet
    autoencoder: Autoencoder
    conditioner: Conditioner
    num_frames: int
    height: int
    width: int
    sampling: SampleConfig
    """A run's own, of its previews: it may have learned few noise levels. Else the released SVD's."""


def load_pipeline(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    which: str | None = None,
    frozen: str | None = None,
    lora: tuple[Path, float] | None = None,
) -> Pipeline:
    """Read a run's or a checkpoint's folder, a diffusers pipeline, or an original single file.

    which: of a run, the name of an average, or raw; its first average by default. frozen: where vae/ and the
    encoders are, a folder or a hub id; by default where the run had them, or the pipeline itself. lora: a
    LoRA file, and the scale at which its updates are added to the weights.
    Raises FileNotFoundError or ValueError where a part is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no run and no pipeline {path}")
    settings = run_settings(path)
    if settings is None and frozen is None and not (path / "vae").is_dir():
        raise ValueError(
            f"{path} has neither config.yaml nor vae/, so the folder that has vae/ must be named"
        )
    unet = load_unet(path, which=which)
    if lora is not None:
        merge_lora_file(unet, *lora)
    unet = unet.to(device, dtype).eval()
    if settings is None:
        shape, sampling = (unet.config.num_frames, *RELEASED_SIZE), SampleConfig()
        given = "ends" if unet.config.masked else "image"
        parts, conditioning = frozen or str(path), ConditionerConfig(context=given, concat=given)
    else:
        data = settings["data"]
        shape = (data["num_frames"], data["height"], data["width"])
        names = {entry.name for entry in fields(SampleConfig)}
        sampling = SampleConfig(**{k: v for k, v in settings["sampling"].items() if k in names})
        parts = frozen or settings["frozen"]["path"]
        scalars = tuple(settings["conditioning"]["scalars"])
        conditioning = ConditionerConfig(**settings["conditioning"] | {"scalars": scalars})
    parts = frozen_folder(parts)
    return Pipeline(
        unet,
        Autoencoder.load(parts, device, dtype),
        Conditioner.load(conditioning, parts, device, dtype),
        *shape,
        sampling,
    )


def run_settings(path: Path) -> dict[str, Any] | None:
    """config.yaml of the run that `path` is, or is a checkpoint of; its copy in logs/ where it is damaged.

    Raises:
        ValueError: both are damaged; the message names config.yaml.
    """
    for folder in (path, *path.resolve().parents[:2]):
        file, copy = folder / "config.yaml", folder / "logs" / "config.yaml"
        if file.is_file():
            try:
                return _whole_settings(file)
            except ValueError:
                if not copy.is_file():
                    raise
                return _whole_settings(copy)
    return None


def _whole_settings(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it is no config of a run")
    return settings
