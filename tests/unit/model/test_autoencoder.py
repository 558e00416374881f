"""The frozen autoencoder equals that of diffusers, and its fingerprint identifies the encoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import svd_ds
from svd_ds.model.autoencoder import Autoencoder, posterior

TINY = Path(svd_ds.__file__).parent / "assets" / "tiny_svd"


@pytest.fixture(scope="module")
def public() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder.from_pretrained(
        TINY, subfolder="vae", torch_dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def ours() -> Autoencoder:
    return Autoencoder.load(TINY, chunk=3)


@pytest.fixture
def frames_NCHW() -> torch.Tensor:
    return torch.rand(7, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_moments_equal_diffusers_for_any_chunk_size(ours, public, frames_NCHW):
    distribution = public.encode(frames_NCHW).latent_dist
    moments = ours.encode(frames_NCHW)
    assert moments.shape == (7, 8, 4, 6)
    torch.testing.assert_close(moments, distribution.parameters, rtol=1e-4, atol=1e-4)


def test_posterior_mean_and_sample_equal_diffusers():
    moments = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0)) * 20
    distribution = DiagonalGaussianDistribution(moments)
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(posterior(moments), distribution.mode())
    drawn = distribution.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(posterior(moments, noise), drawn)
    assert posterior(moments[:, None], noise[:, None]).shape == (2, 1, 4, 4, 6)


@torch.no_grad()
def test_decode_undoes_the_scaling_and_never_mixes_chunks_or_clips(ours, public):
    latents = torch.randn(2, 5, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    decoded = ours.decode(latents)
    assert decoded.shape == (2, 5, 3, 32, 48)
    assert decoded.abs().max() <= 1
    for clip, frames in zip(latents, decoded, strict=True):
        expected = [public.decode(few / 0.18215, num_frames=len(few)).sample for few in (clip[:3], clip[3:])]
        torch.testing.assert_close(frames, torch.cat(expected).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_network_is_frozen_and_keeps_no_graph(ours, frames_NCHW):
    frames_NCHW.requires_grad_()
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())
    assert not ours.network.training
    moments = ours.encode(frames_NCHW)
    assert not moments.requires_grad
    assert not ours.decode(posterior(moments)[None]).requires_grad


def test_tiny_autoencoder_has_the_public_scaling_channels_and_downsampling(ours):
    assert (ours.scaling_factor, ours.latent_channels, ours.downsampling) == (0.18215, 4, 8)


def test_fingerprint_depends_on_the_encoder_alone_at_any_precision(ours):
    fingerprint = ours.fingerprint()
    assert re.fullmatch(r"[0-9a-f]{12}", fingerprint)
    other = Autoencoder.load(TINY, dtype=torch.bfloat16)
    assert other.fingerprint() == fingerprint
    other.network.decoder.conv_out.bias += 1
    assert other.fingerprint() == fingerprint, "moments do not depend on the decoder"
    other.network.quant_conv.bias[0] += 1
    assert other.fingerprint() != fingerprint


def test_network_that_overflows_in_float16_stays_in_float32(frames_NCHW):
    half, bfloat = Autoencoder.load(TINY, dtype=torch.float16), Autoencoder.load(TINY, dtype=torch.bfloat16)
    assert half.network.dtype == torch.float32
    assert bfloat.network.dtype == torch.bfloat16
    assert bfloat.encode(frames_NCHW[:1]).dtype == torch.float32
    assert half.encode(frames_NCHW[:1].half()).dtype == torch.float32


def test_size_that_is_no_multiple_of_eight_is_refused_with_both_numbers(ours):
    with pytest.raises(ValueError, match=r"36x48.*multiples of 8"):
        ours.encode(torch.zeros(1, 3, 36, 48))


def test_chunk_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="chunk is 0"):
        Autoencoder.load(TINY, chunk=0)


def test_wrong_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        Autoencoder.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"has no vae/config\.json"):
        Autoencoder.load(tmp_path)
    (tmp_path / "vae").mkdir()
    shutil.copy(TINY / "vae" / "config.json", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        Autoencoder.load(tmp_path)


def test_folder_with_only_the_half_precision_variant_is_read(tmp_path, ours):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    kernel = Autoencoder.load(tmp_path).network.quant_conv.weight
    assert torch.equal(kernel, ours.network.quant_conv.weight)


def test_hub_id_is_passed_on_and_its_failure_is_one_sentence(monkeypatch):
    asked = []

    def no_network(path, **options):
        asked.append((path, options))
        raise OSError("offline")

    def config(path, **options):
        asked.append((path, options))
        return {"_class_name": "AutoencoderKLTemporalDecoder"}

    monkeypatch.setattr(AutoencoderKLTemporalDecoder, "from_pretrained", no_network)
    monkeypatch.setattr(AutoencoderKL, "load_config", config)
    with pytest.raises(FileNotFoundError, match=r"some/model is not a local folder.*offline"):
        Autoencoder.load("some/model")
    assert asked == [
        ("some/model", {"subfolder": "vae"}),
        ("some/model", {"subfolder": "vae", "dtype": torch.float32, "use_safetensors": True}),
    ]
    monkeypatch.setattr(AutoencoderKL, "load_config", no_network)
    with pytest.raises(FileNotFoundError, match=r"some/model is not a local folder.*offline"):
        Autoencoder.load("some/model")


def test_autoencoder_of_another_class_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(ValueError, match="is AutoencoderTiny: it must be one of AutoencoderKL"):
        Autoencoder.load(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no _class_name"):
        Autoencoder.load(tmp_path)
