"""The denoising network F of Stable Video Diffusion: the UNet of Stable Diffusion 2.1 with a temporal layer
after each spatial one (arXiv 2311.15127 section D; public sources: sgm `video_model.py`, diffusers
`UNetSpatioTemporalConditionModel`, to which it is numerically equal).

Shapes: B clips, T frames, C channels, H x W latent pixels, L context tokens, D context width, S scalars, E
width of the time embedding. Outside (B, T, C, H, W), inside (B, T, H, W, C): see layers.py.
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
    sinusoid,
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
"""The kinds of layers of time, and the blocks that have them."""


@dataclass(frozen=True)
class UNetConfig(Settings, section="model"):
    """The shape of the network. The defaults are the released image-to-video models, SVD and SVD-XT."""

    in_channels: int = number(8, ge=1, le=65_536)
    """4 noisy latent channels, and the 4 of the conditioning frame where there is one (9 with a mask)."""
    masked: bool = False
    """The last input channel is a mask, 1 where a frame is given; a learned embedding stands for the latents
    of the others (frame interpolation, arXiv 2311.15127 D.5)."""
    out_channels: int = number(4, ge=1, le=65_536)
    widths: tuple[int, ...] = number((320, 640, 1280, 1280), ge=1, le=65_536)
    """Channels at each level. Each level halves the height and width of the one before."""
    num_layers: int = number(2, ge=1, le=1000)
    """Residual blocks at a level on the way down; the way up has one more."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels have a transformer after each residual block. The middle always has one."""
    transformer_depth: int = number(1, ge=1, le=1000)
    context_width: int = number(1024, ge=1, le=65_536)
    """Width of the cross-attention tokens."""
    head_width: int = number(64, ge=1, le=65_536)
    """Channels of an attention head."""
    num_scalars: int = number(3, ge=0, le=1000)
    """Numbers that describe a clip: fps - 1, motion bucket, augmentation sigma. 0: no such input."""
    scalar_width: int = number(256, ge=2, le=65_536)
    """Width of the sinusoidal embedding of each scalar."""
    num_frames: int = number(14, ge=1, le=10_000)
    """The clip length that samplers take by default. The network itself takes any."""
    temporal: str = choice("svd", BLOCKS)
    """The layers of time: svd (VideoLDM's too), make_a_video (pseudo3d.py) or none (image.py)."""
    spatial_attention: str = choice("auto", BACKENDS)
    """For attention among a frame's pixels, and to the context: attention.BACKENDS."""
    temporal_attention: str = choice("auto", BACKENDS)
    """The same for attention along time."""
    kernels: str = choice("auto", KERNELS)
    """auto, triton or torch: for group norm with SiLU, and GEGLU."""

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
                    f"each of model.widths must be a multiple of {NORM_GROUPS} (group norm) and of "
                    f"model.head_width, {self.head_width}, which {width} is not"
                )
        if self.masked and self.in_channels < (least := self.out_channels + 2):
            raise ValueError(
                f"model.in_channels is {self.in_channels}: with model.masked it must be at least {least}, "
                f"{self.out_channels} noisy ones, a given frame's and the mask"
            )
        if self.scalar_width % 2:
            raise ValueError(f"model.scalar_width is {self.scalar_width}: it must be even")

    @property
    def embedding_width(self) -> int:
        return 4 * self.widths[0]

    @property
    def size_multiple(self) -> int:
        """Latent heights and widths must be multiples of this."""
        return 2 ** (len(self.widths) - 1)


class ScalarEmbedding(EmbeddingMLP):
    """The numbers that describe a clip as a vector. No image model has it."""

    tag = "condition"


class TimestepEmbedding(nn.Module):
    """The noise level and the scalars of a clip as one vector that every residual block receives."""

    tag = "embedding"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.time = EmbeddingMLP(config.widths[0], width, width)
        if config.num_scalars:
            self.scalars = ScalarEmbedding(config.num_scalars * config.scalar_width, width, width)

    def forward(self, c_noise_B: Tensor, scalars_BS: Tensor) -> Tensor:
        embedding_BE = self.time(sinusoid(c_noise_B, self.config.widths[0]))
        if self.config.num_scalars:
            waves_BSW = sinusoid(scalars_BS, self.config.scalar_width)
            # As sgm drops a signal (GeneralConditioner's ucg_rate).
            waves_BSW = waves_BSW.masked_fill(scalars_BS.isnan()[..., None], 0.0)
            embedding_BE = embedding_BE + self.scalars(waves_BSW.flatten(1))
        return embedding_BE


class UNet(nn.Module):
    """F(x; c_noise, conditioning), arXiv 2311.15127 section D.1."""

    tag = "spatial"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TimestepEmbedding(config)
        if config.masked:
            self.mask_embedding = MaskEmbedding(config.in_channels - config.out_channels - 1)
        self.conv_in = FrameConv(config.in_channels, config.widths[0])
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        residual_kind, transformer_kind = BLOCKS[config.temporal]
        backends = (config.spatial_attention, config.temporal_attention)
        sizes = TransformerSizes(config.context_width, config.head_width, config.transformer_depth, *backends)

        def residual(in_width: int, width: int, eps: float) -> nn.Module:
            return residual_kind(in_width, width, config.embedding_width, eps)

        def transformer(width: int, attends: bool) -> nn.Module | None:
            return transformer_kind(width, sizes) if attends else None

        levels = list(zip(config.widths, config.attention_levels, strict=True))
        width = config.widths[0]
        skips = [width]
        for level, (level_width, attends) in enumerate(levels):
            for _ in range(config.num_layers):
                # diffusers' choice of eps, block by block; sgm has 1e-5 everywhere. See docs/numerics.md.
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
                last_of_level = level > 0 and index == config.num_layers
                resize = Upsample(level_width) if last_of_level else None
                self.decoder.append(UNetStage(block, transformer(level_width, attends), resize))
                width = level_width

        self.norm_out = FrameGroupNorm(width, eps=1e-5)
        self.conv_out = ZeroFrameConv(width, config.out_channels)
        choose_kernels(self, config.kernels)

    def forward(
        self,
        x_BTCHW: Tensor,
        c_noise_B: Tensor,
        context_BLD: Tensor,
        scalars_BS: Tensor,
        image_only_BT: Tensor | None = None,
    ) -> Tensor:
        """The network output, (B, T, C_out, H, W), in the dtype of the weights.

        Args:
            x_BTCHW: noisy latents times c_in, then the conditioning channels, with a mask the last of them.
            c_noise_B: 0.25 ln sigma.
            context_BLD: text states or image tokens, for all frames of the clip.
            scalars_BS: raw values: fps - 1, motion bucket, augmentation sigma; NaN withholds one.
            image_only_BT: bool, True where a frame is an image of its own and skips the temporal layers.

        Raises:
            ValueError: a shape does not fit the config.
        """
        check_inputs(self.config, x_BTCHW, c_noise_B, context_BLD, scalars_BS, image_only_BT)
        dtype = self.conv_in.weight.dtype
        embedding_BE = F.silu(self.embedding(c_noise_B, scalars_BS))
        context_BLD = context_BLD.to(dtype)
        x_BTCHW = x_BTCHW.to(dtype)
        if self.config.masked:
            x_BTCHW = self.mask_embedding(x_BTCHW)
        h = self.conv_in(x_BTCHW.permute(0, 1, 3, 4, 2).contiguous())
        skips = [h]
        for layer in self.encoder:
            h = layer(h, embedding_BE, context_BLD, image_only_BT)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding_BE, context_BLD, image_only_BT)
        for layer in self.decoder:
            h = layer(torch.cat([h, skips.pop()], dim=-1), embedding_BE, context_BLD, image_only_BT)
        return self.conv_out(self.norm_out(h)).permute(0, 1, 4, 2, 3).contiguous()

    def blocks(self) -> dict[str, nn.Module]:
        """Every residual block and transformer by name: the units to recompute, and to shard, as a whole."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, BLOCKS[self.config.temporal])
        }


def check_inputs(
    config: UNetConfig,
    x_BTCHW: Tensor,
    c_noise_B: Tensor,
    context_BLD: Tensor,
    scalars_BS: Tensor,
    image_only_BT: Tensor | None,
) -> None:
    """Refuse, before any compute, inputs that the network cannot take."""
    if x_BTCHW.dim() != 5 or x_BTCHW.shape[2] != config.in_channels:
        raise ValueError(
            f"the UNet takes latents of shape (B, T, {config.in_channels}, H, W), not {tuple(x_BTCHW.shape)}"
        )
    num_clips, num_frames, _, *size = x_BTCHW.shape
    for name, length in zip(("height", "width"), size, strict=True):
        if length % config.size_multiple:
            raise ValueError(
                f"the latent {name} {length} ({length * PIXELS_PER_LATENT} pixels) is not a multiple of "
                f"{config.size_multiple} ({config.size_multiple * PIXELS_PER_LATENT} pixels)"
            )
    expected = {
        "c_noise": (c_noise_B, (num_clips,)),
        "context": (context_BLD, (num_clips, "tokens", config.context_width)),
        "scalars": (scalars_BS, (num_clips, config.num_scalars)),
    }
    if image_only_BT is not None:
        expected["image_only"] = (image_only_BT, (num_clips, num_frames))
    for name, (tensor, shape) in expected.items():
        fits = [length in (size, "tokens") for length, size in zip(shape, tensor.shape, strict=False)]
        if tensor.dim() != len(shape) or not all(fits):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have the shape ({wanted}), not {tuple(tensor.shape)}")


def parameter_tags(unet: nn.Module) -> dict[str, str]:
    """Each parameter's tag by name: the `tag` of the innermost module around it that has one.

    Returns:
        name -> "spatial" (the image model), "embedding" (its embedding of the noise level), "temporal" (the
        layers that video adds) or "condition" (the embeddings that it adds: scalars, mask).
    """
    tags: dict[str, str] = {}
    modules = dict(unet.named_modules())
    for name, _ in unet.named_parameters():
        path = name.split(".")
        around = (modules[".".join(path[:depth])] for depth in reversed(range(len(path))))
        tags[name] = next(module.tag for module in around if hasattr(module, "tag"))
    return tags
