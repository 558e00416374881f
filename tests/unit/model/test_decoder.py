"""The temporal decoder equals diffusers', and at first an image decoder that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import nn

from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.decoder import Decoder, DecoderConfig, build_decoder, fold_pointwise_conv
from svd_ds.model.unet import parameter_tags
from svd_ds.sample import TINY
from tests.networks import image_autoencoder


@torch.no_grad()
def test_decoder_equals_diffusers_for_every_clip() -> None:
    theirs: Any = AutoencoderKLTemporalDecoder.from_pretrained(TINY, subfolder="vae")
    ours, new = build_decoder(theirs)
    assert new == []
    latents = torch.randn(2, 3, 4, 8, 8)
    frames = ours(latents)
    assert frames.shape == (2, 3, 3, 64, 64)
    for clip, decoded in zip(latents, frames, strict=True):
        assert torch.allclose(decoded, theirs.decode(clip, num_frames=3).sample, atol=1e-6)


def test_added_video_layers_are_tagged_temporal() -> None:
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig())
    tags = parameter_tags(decoder)
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    temporal = {name for name, tag in tags.items() if tag == "temporal"}
    assert set(tags.values()) == {"spatial", "temporal"}
    assert temporal == {name for name in tags if "temporal" in name or "time_" in name}
    # The released decoder's (Stability-AI/generative-models VideoDecoder).
    assert sum(sizes.values()) == 63_579_183
    assert (sum(sizes[name] for name in temporal), len(temporal)) == (14_089_004, 128)
    assert len(decoder.blocks()) == 14


@torch.no_grad()
def test_decoder_of_an_image_autoencoder_starts_with_the_same_frames() -> None:
    image = image_autoencoder()
    nn.init.zeros_(image.post_quant_conv.bias)
    decoder, new = build_decoder(image)
    tags = parameter_tags(decoder)
    assert sorted(new) == sorted(name for name, tag in tags.items() if tag == "temporal")
    latents = torch.randn(3, 4, 8, 8)
    expected = image.decode(latents).sample
    assert torch.allclose(decoder(latents[None])[0], expected, atol=1e-4 * expected.abs().max())

    # With diffusers' initial values the frames would change: the blend starts at a half.
    fresh = Decoder(decoder.config)
    state = {name: value for name, value in decoder.state_dict().items() if name not in new}
    fresh.load_state_dict(state, strict=False)
    assert (fresh(latents[None])[0] - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_new_layers_start_equal_on_every_rank_and_get_gradients() -> None:
    image = image_autoencoder()
    (one, new), (other, _) = build_decoder(image, seed=3), build_decoder(image, seed=3)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.enable_grad():
        one(torch.randn(1, 3, 4, 4, 4)).square().mean().backward()
    learns = {name for name, p in one.named_parameters() if name in new and p.grad.abs().max() > 0}
    assert {name for name in learns if "conv2" in name} == {
        name for name in new if "temporal_res_block.conv2" in name
    }


@torch.no_grad()
def test_folded_convolution_is_exact_except_for_the_bias_at_the_border() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 16, 3, padding=1)
    x = torch.randn(2, 4, 6, 7)

    def folded() -> torch.Tensor:
        weights = fold_pointwise_conv(first, second)
        return nn.functional.conv2d(x, weights["conv_in.weight"], weights["conv_in.bias"], padding=1)

    difference = (folded() - second(first(x))).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-5, "inside it is exact"
    assert difference.max() > 0.05, "at the border the bias went through a kernel that is partly outside"
    first.bias.zero_()
    assert torch.allclose(folded(), second(first(x)), atol=1e-5), "without a bias it is exact everywhere"


def test_image_decoder_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 layers a block: to get temporal layers it must have 2"):
        build_decoder(image_autoencoder(num_layers=1))


@torch.no_grad()
def test_image_autoencoder_decodes_frame_by_frame(tmp_path: Path) -> None:
    image = image_autoencoder()
    image.save_pretrained(tmp_path / "vae")
    ours = Autoencoder.load(tmp_path)
    latents = torch.randn(1, 2, 4, 4, 4)
    expected = image.decode(latents[0] / ours.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(ours.decode(latents)[0], expected, atol=1e-5)
