"""The trainable decoder of the autoencoder, with temporal layers.

It is diffusers' TemporalDecoder (sgm temporal_ae.py): each residual block of Stable Diffusion 2.1's decoder
is followed by one that mixes frames, blended in by a learned share that starts at 0.5, and the output passes
a convolution over time (training: VideoLDM, arXiv 2304.08818 section 3.1.1). `build_decoder` can also extend
an image decoder to one. weights/decoder.py loads and saves decoders.

Shape legend: B clips, T frames, C latent channels, H x W pixels, h x w latent pixels (H/8 x W/8).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn

NUM_IMAGE_LAYERS = 2
"""Residual blocks of a level, and of the middle, in an image decoder that can get temporal layers."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder; the defaults are those of the released one."""

    latent_channels: int = 4
    out_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each level, from the level of the frames to that of the latents."""
    num_layers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))

    @staticmethod
    def from_autoencoder(autoencoder: Any) -> DecoderConfig:
        """Return the config of the decoder that fits diffusers' `autoencoder`."""
        fields = autoencoder.config
        return DecoderConfig(
            fields.latent_channels, fields.out_channels, fields.block_out_channels, fields.layers_per_block
        )


class Decoder(TemporalDecoder):
    """Decoder of latents to frames; parameters have diffusers' names, and the tags of `parameter_tags`."""

    tag = "spatial"

    def __init__(self, config: DecoderConfig) -> None:
        widths: Any = config.widths  # diffusers declares a tuple of one
        super().__init__(config.latent_channels, config.out_channels, widths, config.num_layers)
        self.config = config
        for module in self._temporal_modules():
            module.tag = "temporal"  # type: ignore[assignment]

    def forward(self, latents: Tensor) -> Tensor:  # type: ignore[override]
        """Decode clips.

        Args:
            latents: unscaled, (B, T, C, h, w).

        Returns:
            Frames, about [-1, 1], (B, T, 3, H, W), in the dtype of the weights.
        """
        latents_BTChw = latents.to(self.conv_in.weight.dtype)
        num_clips, num_frames = latents_BTChw.shape[:2]
        image_only_BT = latents_BTChw.new_zeros(num_clips, num_frames)
        frames_NCHW = super().forward(latents_BTChw.flatten(0, 1), image_only_BT, num_frames)
        return frames_NCHW.unflatten(0, (num_clips, num_frames))

    def blocks(self) -> dict[str, nn.Module]:
        """Return name -> residual block with its temporal layers, the units of recomputation and ZeRO-3."""
        return {name: part for name, part in self.named_modules() if isinstance(part, SpatioTemporalResBlock)}

    @torch.no_grad()
    def init_temporal_identity(self) -> None:
        """Set the temporal layers to the identity, so that an image decoder's frames stay the same.

        diffusers' initial values are not neutral: the blend takes half of what a block adds to its frames,
        and the last convolution has no blend. Zeros in the last layer of each block (as in sgm) and an
        identity at the end are.
        """
        for module in self._temporal_modules():
            if isinstance(module, TemporalResnetBlock):
                last: Any = module.conv2  # its bias has an optional type
                last.weight.zero_()
                last.bias.zero_()
        end: Any = self.time_conv_out
        nn.init.dirac_(end.weight)
        end.bias.zero_()

    def _temporal_modules(self) -> Iterator[nn.Module]:
        yield self.time_conv_out
        yield from (part for part in self.modules() if isinstance(part, (TemporalResnetBlock, AlphaBlender)))


def build_decoder(autoencoder: Any, seed: int = 0) -> tuple[Decoder, list[str]]:
    """Build the decoder of diffusers' `autoencoder`, float32 on the CPU.

    An image autoencoder (AutoencoderKL) has no temporal layers. New ones are initialised from `seed` such
    that they leave its frames unchanged. Its 1 x 1 convolution of the latents is folded into the next one,
    see `fold_pointwise_conv`.

    Returns:
        The decoder, and the names of its new parameters.

    Raises:
        ValueError: an image decoder has other blocks than Stable Diffusion's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(DecoderConfig.from_autoencoder(autoencoder))
    is_image = isinstance(autoencoder, AutoencoderKL)
    if not is_image:
        decoder.load_state_dict(autoencoder.decoder.state_dict())
        return decoder, []
    if decoder.config.num_layers != NUM_IMAGE_LAYERS:
        raise ValueError(
            f"the image autoencoder has {decoder.config.num_layers} layers a block: to get temporal layers "
            f"it must have {NUM_IMAGE_LAYERS}, as Stable Diffusion's"
        )
    decoder.init_temporal_identity()
    weights = {
        re.sub(r"(resnets\.\d+)\.", r"\1.spatial_res_block.", name): value
        for name, value in autoencoder.decoder.state_dict().items()
    }
    if autoencoder.post_quant_conv is not None:
        weights |= fold_pointwise_conv(autoencoder.post_quant_conv, autoencoder.decoder.conv_in)
    result = decoder.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    return decoder, result.missing_keys


def fold_pointwise_conv(first: nn.Conv2d, second: nn.Conv2d) -> dict[str, Tensor]:
    """Fold a 1 x 1 convolution into the padded 3 x 3 convolution after it.

    The result is exact, except at the outermost latent pixels if `first` has a bias: the zeros that `second`
    pads with do not pass through `first`, which one convolution cannot express.

    Returns:
        Weight and bias of `conv_in`, float32.
    """
    kernel = first.weight[:, :, 0, 0].double()
    weight = second.weight.double()
    assert first.bias is not None and second.bias is not None
    bias = second.bias.double() + weight.sum(dim=(2, 3)) @ first.bias.double()
    folded = torch.einsum("ojhw,ji->oihw", weight, kernel)
    return {"conv_in.weight": folded.float(), "conv_in.bias": bias.float()}
