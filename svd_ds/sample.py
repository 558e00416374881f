"""Sampling of videos from a first frame, from both ends or from a caption.

    first frame -> Conditioning    (clean to CLIP; noised, encoded, repeated to all frames; scalars)
    or both ends                   (likewise, each on its own frame: the network interpolates)
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

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import Network, denoise
from svd_ds.diffusion.draws import draw
from svd_ds.diffusion.guidance import KINDS, guidance_scale, guided
from svd_ds.diffusion.noise import karras_sigmas
from svd_ds.diffusion.samplers import SAMPLERS, Progress
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.layers import choose_kernels
from svd_ds.model.ops.trial import choose_on_this_machine
from svd_ds.model.unet import UNet
from svd_ds.scalars import AUGMENTATION, FPS, MOTION_BUCKET, RELEASED_SCALARS, SCALARS
from svd_ds.settings import INT64_MAX, Settings, choice, number
from svd_ds.small_files import read_yaml
from svd_ds.weights.io import load_unet, merge_lora_file

TINY = Path(__file__).parent / "assets" / "tiny_svd"
"""Folder of the frozen parts that are included in the package: frozen.path=tiny."""
RELEASED_SIZE = (576, 1024)
"""Height and width of the public SVD and SVD-XT, which their configs do not contain."""


def frozen_folder(path: str) -> str:
    """Resolve a setting like `frozen.path`: a folder, a hub id, or `tiny` for those in the package."""
    return str(TINY) if path == "tiny" else path


@dataclass(frozen=True)
class SampleConfig(Settings, section="sampling"):
    """Settings of sampling. The defaults are the released SVD's (Stability-AI/generative-models
    simple_video_sample.py)."""

    num_steps: int = number(25, ge=1, le=10_000)
    """Number of sampling steps."""
    sampler: str = choice("euler", SAMPLERS)
    """Sampler: euler (one network call a step) or heun (two)."""
    sigma_min: float = number(0.002, ge=1e-6, le=1e6)
    """Last noise level before 0."""
    sigma_max: float = number(700.0, ge=1e-6, le=1e6)
    """First noise level."""
    rho: float = number(7.0, ge=1, le=100)
    """Exponent of the spacing of the noise levels (arXiv 2206.00364 equation 5); 1 spaces them evenly."""
    guidance: str = choice("linear", KINDS)
    """Guidance scale over the frames: constant, linear (from the lowest at the first frame to the highest at
    the last) or triangle (lowest at both ends, highest in the middle)."""
    guidance_min: float = number(1.0, ge=-1000, le=1000)
    """Lowest guidance scale; not used by constant guidance."""
    guidance_max: float = number(2.5, ge=-1000, le=1000)
    """Highest guidance scale."""
    fps: float = number(FPS.sampling_default, ge=FPS.low, le=FPS.high, hint="conf/train.yaml takes data.fps")
    """Frames per second of the video. The network embeds fps - 1, as in training."""
    motion_bucket: float = number(MOTION_BUCKET.sampling_default, ge=MOTION_BUCKET.low, le=MOTION_BUCKET.high)
    """Amount of motion, 0 to 255."""
    augmentation: float = number(AUGMENTATION.sampling_default, ge=AUGMENTATION.low, le=AUGMENTATION.high)
    """Noise level (sigma) of the noise that is added to the conditioning frames."""
    scalars: dict[str, float] = number(dict, ge=-1e6, le=1e6)
    """Further scalar (svd_ds/scalars.py) -> value; scalars without an entry have their default."""
    seed: int = number(0, ge=0, le=INT64_MAX)
    """Seed of the initial noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sampling.sigma_min is {self.sigma_min}: it must be below sampling.sigma_max, "
                f"{self.sigma_max}"
            )
        for name, value in self.scalars.items():
            if name in RELEASED_SCALARS:
                raise ValueError(f"sampling.scalars names {name}: sampling.{name} must be set instead")
            if name not in SCALARS:
                others = ", ".join(name for name in SCALARS if name not in RELEASED_SCALARS)
                raise ValueError(f"sampling.scalars names {name}: it must be one of {others}")
            if wrong := SCALARS[name].check(value):
                raise ValueError(f"sampling.scalars.{name} is {value}: it must be {wrong}")

    def scalar_values(self) -> dict[str, float]:
        """Collect the value of every scalar; those that have no default and are not set are left out."""
        values = {name: scalar.sampling_default for name, scalar in SCALARS.items()}
        values |= {name: getattr(self, name) for name in RELEASED_SCALARS} | self.scalars
        return {name: value for name, value in values.items() if value is not None}


@torch.no_grad()
def sample_video(
    net: Network,
    autoencoder: Autoencoder,
    conditioner: Conditioner,
    first_frame: Tensor,
    num_frames: int,
    config: SampleConfig,
    captions: Sequence[str] | None = None,
    ordinals: Sequence[int] | None = None,
    progress: Progress | None = None,
    last_frame: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Sample a video for each first frame.

    Args:
        net: UNet, or any `svd_ds.diffusion.denoiser.Network`.
        autoencoder: encodes the conditioning frames and decodes the latents.
        conditioner: makes the conditioning from frames, captions and scalars.
        first_frame: (B, 3, H, W) in [-1, 1], on the network's device. A conditioner that takes only text uses
            only its size, which is that of the video.
        num_frames: frames of the videos, T.
        config: settings of sampling.
        captions: one for each video; empty by default.
        ordinals: number of the noise of `config.seed` that each video starts from; by default 0 to B - 1.
        progress: called after each step with the number of steps so far.
        last_frame: (B, 3, H, W) in [-1, 1]; required if the conditioner takes both ends of a clip.
        context: cached output of the conditioner's encoder, (B, L, D).

    Returns:
        (B, T, 3, H, W), float32 in [-1, 1].

    Raises:
        ValueError: the size is not a multiple of the autoencoder's downsampling, there are too few frames, or
            a last frame or the value of a scalar is missing.
    """
    batch_size, _, height, width = first_frame.shape
    downsampling, device = autoencoder.downsampling, first_frame.device
    _check_shape(num_frames, height, width, downsampling)
    latent_shape = (num_frames, autoencoder.latent_channels, height // downsampling, width // downsampling)
    given_shape = conditioner.noise_shape(autoencoder, height, width)
    draws = draw(config.seed, ordinals or range(batch_size), latent_shape, given_shape)
    draws = draws.map(lambda tensor: tensor.to(device))

    conditioning = conditioner(
        autoencoder,
        first_frame=first_frame,
        captions=captions or [""] * batch_size,
        num_frames=num_frames,
        scalars={
            name: torch.full((batch_size,), value, device=device)
            for name, value in config.scalar_values().items()
        },
        noise=draws.given_noise_BKCHW,
        last_frame=last_frame,
        context=context,
    )
    return autoencoder.decode(_sample_latents(net, conditioning, draws.noise_BTChw, config, progress))


def _sample_latents(
    net: Network,
    conditioning: Conditioning,
    noise_BTChw: Tensor,
    config: SampleConfig,
    progress: Progress | None,
) -> Tensor:
    """Solve the probability-flow ODE from sigma_max to 0; returns (B, T, C, h, w)."""
    num_frames = noise_BTChw.shape[1]
    scale_T = guidance_scale(config.guidance, config.guidance_min, config.guidance_max, num_frames)
    guided_denoise = guided(partial(denoise, net), scale_T)
    sigmas = karras_sigmas(config.num_steps, config.sigma_min, config.sigma_max, config.rho)
    start_BTChw = noise_BTChw * math.sqrt(1 + sigmas[0].item() ** 2)
    return SAMPLERS[config.sampler](
        lambda x, sigma_B: guided_denoise(x, sigma_B, conditioning), start_BTChw, sigmas, progress
    )


def _check_shape(num_frames: int, height: int, width: int, multiple: int) -> None:
    if height % multiple or width % multiple:
        raise ValueError(
            f"a video of {height}x{width} pixels cannot be sampled: both must be multiples of {multiple}"
        )
    if num_frames < 1:
        raise ValueError(f"a video of {num_frames} frames cannot be sampled: it needs at least 1")


@dataclass(frozen=True)
class Pipeline:
    """Networks and settings of sampling, and the shape of the clips that the UNet was trained on."""

    unet: UNet
    autoencoder: Autoencoder
    conditioner: Conditioner
    num_frames: int
    height: int
    width: int
    sampling: SampleConfig
    """Sampling settings of the run's previews; for public weights those of the released SVD. A run may have
    trained on few noise levels, which its previews then use."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: faster kernels that cannot be used on this machine."""


def load_pipeline(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    which: str | None = None,
    frozen: str | None = None,
    lora: tuple[Path, float] | None = None,
) -> Pipeline:
    """Read a run's or a checkpoint's folder, a diffusers pipeline, or an original single file.

    Args:
        path: the folder or file.
        device: device of the networks.
        dtype: data type of the networks.
        which: name of an average of a run, or raw; by default its first average.
        frozen: folder or hub id of vae/ and the encoders; by default frozen.path of the run, or the pipeline.
        lora: LoRA file, and the scale at which its updates are added to the weights.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part is missing or damaged, or a kernel that the network names cannot be used.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no run and no pipeline {path}")
    settings = run_settings(path)
    if settings is None and frozen is None and not (path / "vae").is_dir():
        raise ValueError(
            f"{path} has neither config.yaml nor vae/: give the folder that has vae/ by --frozen"
        )
    unet = load_unet(path, which=which)
    if lora is not None:
        merge_lora_file(unet, *lora)
    unet = unet.to(device, dtype).eval()
    kernels = choose_on_this_machine(unet.config, device, dtype)
    choose_kernels(unet, kernels.kernels, kernels.attention)
    if settings is None:
        shape, sampling = (unet.config.num_frames, *RELEASED_SIZE), SampleConfig()
        signal = "ends" if unet.config.masked else "image"
        parts, conditioning = frozen or str(path), ConditionerConfig(context=signal, concat=signal)
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
        kernels.notes,
    )


def run_settings(path: Path) -> dict[str, Any] | None:
    """Read config.yaml of the run that `path` belongs to; if it is damaged, its copy in logs/.

    Args:
        path: folder of a run, or of one of its checkpoints.

    Returns:
        The settings; None if `path` does not belong to a run.

    Raises:
        ValueError: both files are damaged; the message names config.yaml.
    """
    for folder in (path, *path.resolve().parents[:2]):
        file, copy = folder / "config.yaml", folder / "logs" / "config.yaml"
        if file.is_file():
            try:
                return _read_settings(file)
            except ValueError:
                if not copy.is_file():
                    raise
                return _read_settings(copy)
    return None


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it must be a mapping")
    return settings
