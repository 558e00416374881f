"""The autoencoder's decoder with its layers of time, as a network that learns.

It is diffusers' TemporalDecoder (sgm temporal_ae.py): after each residual block of Stable Diffusion 2.1's
decoder one that mixes over time, blended in by a learned share that starts at 0.5, and a convolution along
time at the very end. An image decoder becomes one with `build_decoder`.

Shape legend: B clips, T frames, C latent channels, H x W pixels, h x w latent pixels (H/8 x W/8).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn

from svd_ds.model.autoencoder import Autoencoder
from svd_ds.weights.shards import join_shards, network_of, open_checkpoint

IMAGE_BLOCKS = 2
"""Residual blocks a level, and in the middle, of an image decoder that can be taken up."""

FIELDS = (
    "in_channels", "out_channels", "down_block_types", "block_out_channels", "layers_per_block",
    "latent_channels", "sample_size", "scaling_factor", "force_upcast",
)  # fmt: skip
"""The config of diffusers' AutoencoderKLTemporalDecoder: an image autoencoder's has these and more."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of the network; the defaults are the released one."""

    latent_channels: int = 4
    out_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each level, from the frames' to the latents'."""
    num_layers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))

    @staticmethod
    def of(autoencoder: Any) -> DecoderConfig:
        """The decoder that fits diffusers' `autoencoder`."""
        fields = autoencoder.config
        return DecoderConfig(
            fields.latent_channels, fields.out_channels, fields.block_out_channels, fields.layers_per_block
        )


class Decoder(TemporalDecoder):
    """Latents -> frames. Parameters have diffusers' names, and tags as the UNet's have."""

    tag = "spatial"

    def __init__(self, config: DecoderConfig) -> None:
        widths: Any = config.widths  # diffusers declares a tuple of one
        super().__init__(config.latent_channels, config.out_channels, widths, config.num_layers)
        self.config = config
        for module in self._temporal():
            module.tag = "temporal"  # type: ignore[assignment]

    def forward(self, latents_BTChw: Tensor) -> Tensor:  # type: ignore[override]
        """Latents, not scaled, (B, T, C, h, w) -> frames, about [-1, 1], (B, T, 3, H, W), in the dtype of
        the weights."""
        latents_BTChw = latents_BTChw.to(self.conv_in.weight.dtype)
        num_clips, num_frames = latents_BTChw.shape[:2]
        none_is_still = latents_BTChw.new_zeros(num_clips, num_frames)
        frames_NCHW = super().forward(latents_BTChw.flatten(0, 1), none_is_still, num_frames)
        return frames_NCHW.unflatten(0, (num_clips, num_frames))

    def blocks(self) -> dict[str, nn.Module]:
        """Every residual block with its layers of time, by name: the units to recompute, and to gather."""
        return {name: part for name, part in self.named_modules() if isinstance(part, SpatioTemporalResBlock)}

    @torch.no_grad()
    def init_temporal_identity(self) -> None:
        """Make the layers of time leave every frame as it is: what an image decoder's frames begin with.

        New ones do not: the blend takes half of what a block adds to its frames, and the last convolution has
        no blend at all. Zeros in the last layer of each block (as in sgm) and an identity at the end do.
        """
        for module in self._temporal():
            if isinstance(module, TemporalResnetBlock):
                last: Any = module.conv2  # its bias is optional, says its type
                last.weight.zero_()
                last.bias.zero_()
        end: Any = self.time_conv_out
        nn.init.dirac_(end.weight)
        end.bias.zero_()

    def _temporal(self) -> Iterator[nn.Module]:
        yield self.time_conv_out
        yield from (part for part in self.modules() if isinstance(part, (TemporalResnetBlock, AlphaBlender)))


def build_decoder(autoencoder: Any, seed: int = 0) -> tuple[Decoder, list[str]]:
    """The decoder of diffusers' `autoencoder`, float32 on the CPU, and the names of its new parameters.

    An image autoencoder (AutoencoderKL) has no layers of time: they are new, drawn from `seed`, and leave its
    frames as they are. Its 1 x 1 convolution of the latents is folded into the next one, see `fold`.

    Raises ValueError where an image decoder has other blocks than Stable Diffusion's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(DecoderConfig.of(autoencoder))
    is_image = isinstance(autoencoder, AutoencoderKL)
    if not is_image:
        decoder.load_state_dict(autoencoder.decoder.state_dict())
        return decoder, []
    if decoder.config.num_layers != IMAGE_BLOCKS:
        raise ValueError(
            f"an image autoencoder of {decoder.config.num_layers} layers a block takes no layers of time: it "
            f"needs {IMAGE_BLOCKS}, as Stable Diffusion's"
        )
    decoder.init_temporal_identity()
    weights = {
        re.sub(r"(resnets\.\d+)\.", r"\1.spatial_res_block.", name): value
        for name, value in autoencoder.decoder.state_dict().items()
    }
    if autoencoder.post_quant_conv is not None:
        weights |= fold(autoencoder.post_quant_conv, autoencoder.decoder.conv_in)
    lacking = decoder.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys, lacking.unexpected_keys
    return decoder, lacking.missing_keys


def fold(first: nn.Conv2d, second: nn.Conv2d) -> dict[str, Tensor]:
    """Weights of `conv_in` that do what a 1 x 1 convolution and then a padded 3 x 3 one do.

    Exact, but for the outermost latent pixels where `first` has a bias: the zeros that `second` pads with do
    not go through `first`, and in one convolution the bias cannot know it.
    """
    kernel = first.weight[:, :, 0, 0].double()
    weight = second.weight.double()
    assert first.bias is not None and second.bias is not None
    bias = second.bias.double() + weight.sum(dim=(2, 3)) @ first.bias.double()
    folded = torch.einsum("ojhw,ji->oihw", weight, kernel)
    return {"conv_in.weight": folded.float(), "conv_in.bias": bias.float()}


def load_decoder(path: str | Path, which: str | None = None) -> Decoder:
    """A float32 decoder on the CPU, from the run or checkpoint at `path`.

    which: `raw`, or the name of an average; by default the first average.
    Raises FileNotFoundError where there is nothing, ValueError where it is not a decoder's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if network_of(path) is None:
        raise ValueError(f"{path} is neither a run nor a checkpoint")
    settings, slices = open_checkpoint(path, "decoder", which)
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**settings["config.json"]))
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    weights = {name: join_shards(pieces, shapes[name]) for name, pieces in slices.items()}
    decoder.load_state_dict(weights, assign=True)
    return decoder


def save_pipeline_parts(frozen: str | Path, decoder: Decoder, folder: str | Path) -> None:
    """Write the parts of the pipeline at `frozen` anew, with `decoder` in their vae/.

    Of a hub id, vae/ alone. Raises ValueError where the decoder that is there has another shape.
    """
    autoencoder = Autoencoder.load(frozen)
    theirs, ours = DecoderConfig.of(autoencoder.network), decoder.config
    if theirs != ours:
        raise ValueError(f"the decoder in {frozen} is {theirs}, and the one that was trained {ours}")
    if Path(frozen).is_dir():
        # The pipeline of an image autoencoder is of another class, which would ask for that again.
        left = ["vae"] if autoencoder.mixes_time else ["vae", "model_index.json"]
        shutil.copytree(frozen, folder, ignore=shutil.ignore_patterns(*left))
    fields = autoencoder.network.config
    whole: Any = AutoencoderKLTemporalDecoder(**{field: fields[field] for field in FIELDS})
    whole.encoder.load_state_dict(autoencoder.network.encoder.state_dict())
    whole.quant_conv.load_state_dict(autoencoder.network.quant_conv.state_dict())
    whole.decoder.load_state_dict(decoder.state_dict())
    whole.save_pretrained(str(Path(folder) / "vae"))
