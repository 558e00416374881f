"""A trained decoder is saved into a pipeline that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.decoder import Decoder, DecoderConfig, build_decoder
from svd_ds.sample import TINY
from svd_ds.weights.decoder import save_pipeline_parts
from tests.networks import image_autoencoder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_saved_autoencoder_is_read_by_diffusers(kind: str, tmp_path: Path) -> None:
    frozen = TINY
    if kind == "image":
        frozen = tmp_path / "image"
        image_autoencoder().save_pretrained(frozen / "vae")
        (frozen / "model_index.json").write_text("{}")
    source = Autoencoder.load(frozen).network
    decoder, _ = build_decoder(source)
    for parameter in decoder.parameters():
        parameter += 0.01
    out = tmp_path / "out"
    save_pipeline_parts(frozen, decoder, out)
    theirs: Any = AutoencoderKLTemporalDecoder.from_pretrained(out, subfolder="vae")
    latents, frames = torch.randn(2, 4, 4, 4), torch.randn(1, 3, 32, 32)
    assert torch.allclose(theirs.decode(latents, num_frames=2).sample, decoder(latents[None])[0], atol=1e-5)
    expected = source.encode(frames).latent_dist.mean
    assert torch.allclose(theirs.encode(frames).latent_dist.mean, expected, atol=1e-5)
    assert Autoencoder.load(out).fingerprint() == Autoencoder(source).fingerprint()
    assert (out / "model_index.json").exists() == (kind == "video")
    assert (out / "image_encoder").is_dir() == (kind == "video")
    with torch.device("meta"):
        other = Decoder(DecoderConfig())
    with pytest.raises(ValueError, match=r"widths=\(32, .*trained.*\(128, 256, 512, 512\)"):
        save_pipeline_parts(frozen, other, out)
