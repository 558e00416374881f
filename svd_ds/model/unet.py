"""The denoising network F of Stable Video Diffusion: the UNet of Stable Diffusion 2.1 with a temporal layer
after each spatial one (arXiv 2311.15127 section D; public sources: sgm `video_model.py`, diffusers
`UNetSpatioTemporalConditionModel`, to which it is numerically equal).

Shape legend: B clips, T frames, C channels, h x w latent pixels, L context tokens, D context width, S
scalars, W width of a scalar's embedding, E width of the time embedding. Inputs and outputs are (B, T, C, h,
w); inside, activations are (B, T, h, w, C), see layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.model.blocks import Downsample, Residual, Transformer, UNetStage, Upsample
from svd_ds.model.image import ImageResidual, ImageTransformer, TransformerSizes
from svd_ds.model.layers import (
    NORM_GROUPS,
    EmbeddingMLP,
    FrameConv,
    FrameGroupNorm,
    MaskEmbedding,
    ZeroFrameConv,
    choose_kernels,
    sinusoidal_embedding,
)
from svd_ds.model.ops.attention import BACKENDS
from svd_ds.model.ops.fused import KERNELS
from svd_ds.model.pseudo3d import PseudoResidual, PseudoTransformer
from svd_ds.settings import Settings, choice, number

PIXELS_PER_LATENT = 8
BLOCKS = {
    "svd": (Residual, Transformer),
    "make_a_video": (PseudoResidual, PseudoTransformer),
    "none": (ImageResidual, ImageTransformer),
}
"""Variant of the temporal layers -> classes of the residual block and of the transformer."""


@dataclass(frozen=True)
class UNetConfig(Settings, section="model"):
    """Shape of the network. The defaults are those of the released image-to-video models, SVD and SVD-XT."""

    in_channels: int = number(8, ge=1, le=65_536)
    """Input channels: 4 of the noisy latents, 4 of the conditioning frame (if any), 1 of the mask (if
    any)."""
    masked: bool = False
    """Frame interpolation (arXiv 2311.15127 D.5): the last input channel is a mask, 1 for a given frame, and
    a learned embedding replaces the conditioning latents of the other frames."""
    out_channels: int = number(4, ge=1, le=65_536)
    widths: tuple[int, ...] = number((320, 640, 1280, 1280), ge=1, le=65_536)
    """Channels at each level; each level has half the height and width of the previous one."""
    num_layers: int = number(2, ge=1, le=1000)
    """Residual blocks of a level in the encoder; the decoder has one more."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """True for each level with a transformer after every residual block; the middle always has one."""
    transformer_depth: int = number(1, ge=1, le=1000)
    """Spatial blocks, each with its temporal block, in a transformer."""
    context_width: int = number(1024, ge=1, le=65_536)
    """Width of the cross-attention tokens."""
    head_width: int = number(64, ge=1, le=65_536)
    """Channels of an attention head."""
    num_scalars: int = number(3, ge=0, le=1000)
    """Number of scalar conditions of a clip, such as fps - 1, motion bucket and augmentation sigma; 0: the
    network has no input for scalars."""
    scalar_width: int = number(256, ge=2, le=65_536)
    """Width of the sinusoidal embedding of each scalar."""
    num_frames: int = number(14, ge=1, le=10_000)
    """Default clip length of samplers; the network takes any length."""
    temporal: str = choice("svd", BLOCKS)
    """Temporal layers: svd (blocks.py, as VideoLDM), make_a_video (pseudo3d.py) or none (image.py)."""
    spatial_attention: str = choice("auto", BACKENDS)
    """Backend of attention among a frame's pixels and to the context (docs/numerics.md)."""
    temporal_attention: str = choice("auto", BACKENDS)
    """Backend of attention among a pixel's frames."""
    kernels: str = choice("auto", KERNELS)
    """Kernels of group norm with SiLU and GEGLU: auto (Triton's if all GPUs run them), triton or torch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or len(self.widths) != len(self.attention_levels):
            raise ValueError(
                f"model.widths has {len(self.widths)} levels and model.attention_levels "
                f"{len(self.attention_levels)}: the UNet needs one entry a level in both"
            )
        for width in self.widths:
            if width % NORM_GROUPS or width % self.head_width:
                raise ValueError(
                    f"model.widths has {width}: each width must be a multiple of {NORM_GROUPS} (group norm) "
                    f"and of model.head_width, {self.head_width}"
                )
        if self.masked and self.in_channels < (minimum := self.out_channels + 2):
            raise ValueError(
                f"model.in_channels is {self.in_channels}: with model.masked it must be at least {minimum}, "
                f"{self.out_channels} of the noisy latents, one of a given frame and the mask"
            )
        if self.scalar_width % 2:
            raise ValueError(f"model.scalar_width is {self.scalar_width}: it must be even")

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding, E."""
        return 4 * self.widths[0]

    @property
    def size_multiple(self) -> int:
        """Latent heights and widths must be multiples of this number."""
        return 2 ** (len(self.widths) - 1)


class ScalarEmbedding(EmbeddingMLP):
    """MLP of the scalar conditions, which video models have and image models lack (sgm `label_emb`)."""

    tag = "condition"


class TimestepEmbedding(nn.Module):
    """Embedding of a clip's noise level and scalars, for every residual block: the sum of two MLPs of
    sinusoids (arXiv 2311.15127 section D.2; sgm svd.yaml)."""

    tag = "embedding"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.time = EmbeddingMLP(config.widths[0], width, width)
        if config.num_scalars:
            self.scalars = ScalarEmbedding(config.num_scalars * config.scalar_width, width, width)

    def forward(self, c_noise: Tensor, scalars: Tensor) -> Tensor:
        """Embed c_noise, (B,), and scalars, (B, S), NaN for a dropped one, to (B, E)."""
        embedding_BE = self.time(sinusoidal_embedding(c_noise, self.config.widths[0]))
        if self.config.num_scalars:
            sinusoids_BSW = sinusoidal_embedding(scalars, self.config.scalar_width)
            # sgm zeroes the embedding of a dropped condition, too (GeneralConditioner's ucg_rate).
            sinusoids_BSW = sinusoids_BSW.masked_fill(scalars.isnan()[..., None], 0.0)
            embedding_BE = embedding_BE + self.scalars(sinusoids_BSW.flatten(1))
        return embedding_BE


class UNet(nn.Module):
    """F in D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, arXiv 2206.00364 equation 7; arXiv
    2311.15127 section D.1): an encoder, a middle and a decoder with skip connections."""

    tag = "spatial"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TimestepEmbedding(config)
        if config.masked:
            self.mask_embedding = MaskEmbedding(config.in_channels - config.out_channels - 1)
        self.conv_in = FrameConv(config.in_channels, config.widths[0])
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        residual_class, transformer_class = BLOCKS[config.temporal]
        backends = (config.spatial_attention, config.temporal_attention)
        sizes = TransformerSizes(config.context_width, config.head_width, config.transformer_depth, *backends)

        def residual(in_width: int, width: int, eps: float) -> nn.Module:
            return residual_class(in_width, width, config.embedding_width, eps)

        def transformer(width: int, attends: bool) -> nn.Module | None:
            return transformer_class(width, sizes) if attends else None

        levels = list(zip(config.widths, config.attention_levels, strict=True))
        width = config.widths[0]
        skips = [width]
        for level, (level_width, attends) in enumerate(levels):
            for _ in range(config.num_layers):
                # eps is diffusers', which varies by block; sgm has 1e-5 everywhere. See docs/numerics.md.
                block = residual(width, level_width, eps=1e-6 if attends else 1e-5)
                self.encoder.append(UNetStage(block, transformer(level_width, attends)))
                width = level_width
                skips.append(width)
            if level < len(levels) - 1:
                self.encoder.append(UNetStage(resize=Downsample(width)))
                skips.append(width)

        self.middle.append(UNetStage(residual(width, width, eps=1e-5), transformer(width, True)))
        self.middle.append(UNetStage(residual(width, width, eps=1e-5)))

        for level, (level_width, attends) in reversed(list(enumerate(levels))):
            for index in range(config.num_layers + 1):
                block = residual(width + skips.pop(), level_width, eps=1e-6)
                is_last_of_level = level > 0 and index == config.num_layers
                resize = Upsample(level_width) if is_last_of_level else None
                self.decoder.append(UNetStage(block, transformer(level_width, attends), resize))
                width = level_width

        self.norm_out = FrameGroupNorm(width, eps=1e-5)
        self.conv_out = ZeroFrameConv(width, config.out_channels)
        choose_kernels(self, config.kernels)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        context: Tensor,
        scalars: Tensor,
        image_only: Tensor | None = None,
    ) -> Tensor:
        """Compute F.

        Args:
            x: noisy latents times c_in, then the conditioning channels, the mask (if any) last: (B, T, C, h,
                w).
            c_noise: 0.25 ln sigma, (B,).
            context: text or image tokens, for all frames of the clip, (B, L, D).
            scalars: raw values, fps - 1, motion bucket, augmentation sigma; NaN drops one: (B, S).
            image_only: True if a frame is an independent image and skips the temporal layers, (B, T) bool.

        Returns:
            (B, T, C_out, h, w), in the dtype of the weights.

        Raises:
            ValueError: a shape does not fit the config.
        """
        check_inputs(self.config, x, c_noise, context, scalars, image_only)
        dtype = self.conv_in.weight.dtype
        embedding_BE = F.silu(self.embedding(c_noise, scalars))
        context = context.to(dtype)
        x_BTChw = x.to(dtype)
        if self.config.masked:
            x_BTChw = self.mask_embedding(x_BTChw)
        h = self.conv_in(x_BTChw.permute(0, 1, 3, 4, 2).contiguous())
        skips = [h]
        for stage in self.encoder:
            h = stage(h, embedding_BE, context, image_only)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding_BE, context, image_only)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=-1), embedding_BE, context, image_only)
        return self.conv_out(self.norm_out(h)).permute(0, 1, 4, 2, 3).contiguous()

    def blocks(self) -> dict[str, nn.Module]:
        """Return name -> residual block or transformer: the units of recomputation and of ZeRO-3 sharding."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, BLOCKS[self.config.temporal])
        }


def check_inputs(
    config: UNetConfig,
    x: Tensor,
    c_noise: Tensor,
    context: Tensor,
    scalars: Tensor,
    image_only: Tensor | None,
) -> None:
    """Check the shapes of the network's inputs, see `UNet.forward`.

    Raises:
        ValueError: a shape does not fit the config.
    """
    if x.dim() != 5 or x.shape[2] != config.in_channels:
        raise ValueError(
            f"the UNet takes latents of shape (B, T, {config.in_channels}, h, w), not {tuple(x.shape)}"
        )
    num_clips, num_frames, _, *size = x.shape
    for name, length in zip(("height", "width"), size, strict=True):
        if length % config.size_multiple:
            raise ValueError(
                f"the latent {name} {length} ({length * PIXELS_PER_LATENT} pixels) is not a multiple of "
                f"{config.size_multiple} ({config.size_multiple * PIXELS_PER_LATENT} pixels)"
            )
    expected = {
        "c_noise": (c_noise, (num_clips,)),
        "context": (context, (num_clips, "tokens", config.context_width)),
        "scalars": (scalars, (num_clips, config.num_scalars)),
    }
    if image_only is not None:
        expected["image_only"] = (image_only, (num_clips, num_frames))
    for name, (tensor, shape) in expected.items():
        fits = [length in (size, "tokens") for length, size in zip(shape, tensor.shape, strict=False)]
        if tensor.dim() != len(shape) or not all(fits):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have the shape ({wanted}), not {tuple(tensor.shape)}")


def parameter_tags(unet: nn.Module) -> dict[str, str]:
    """Return parameter name -> `tag` of the innermost module around it that has one: "spatial" (the image
    model), "embedding" (the image model's embedding of the noise level), "temporal" (the temporal layers) or
    "condition" (the embeddings of scalars and mask).
    """
    tags: dict[str, str] = {}
    modules = dict(unet.named_modules())
    for name, _ in unet.named_parameters():
        path = name.split(".")
        around = (modules[".".join(path[:depth])] for depth in reversed(range(len(path))))
        tags[name] = next(module.tag for module in around if hasattr(module, "tag"))
    return tags
