"""Sampling, with a network, an autoencoder and a conditioner whose results are known."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.draws import draw
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.layers import FeedForward
from svd_ds.model.ops import trial
from svd_ds.sample import RELEASED_SIZE, TINY, SampleConfig, load_pipeline, run_settings, sample_video
from svd_ds.training.preview import PreviewConfig

NUM_FRAMES = 3


class Averages:
    """An autoencoder of 8x8 cells: a latent channel is the cell's mean red, green, blue and grey."""

    latent_channels, downsampling, scaling_factor = 4, 8, 0.5

    def latents(self, frames_BCHW: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(frames_BCHW, 8)
        return torch.cat([cells, cells.mean(dim=1, keepdim=True)], dim=1)

    def decode(self, latents_BTChw: Tensor) -> Tensor:
        cells = latents_BTChw[:, :, :3] / self.scaling_factor
        return cells.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


class Recorder:
    """A conditioner that concatenates the noised first frame and keeps its arguments."""

    def noise_shape(self, autoencoder: Averages, height: int, width: int) -> tuple[int, int, int, int]:
        return 1, 3, height, width

    def __call__(
        self, autoencoder: Averages, *, first_frame: Tensor, num_frames: int, **given: Any
    ) -> Conditioning:
        self.given = given
        values = given["scalars"]
        sigma = values["augmentation"][:, None, None, None]
        noised = autoencoder.latents(first_frame + sigma * given["noise"][:, 0])
        scalars = torch.stack([values["fps"] - 1, values["motion_bucket"], values["augmentation"]], dim=1)
        return Conditioning(
            context_BLD=torch.ones(len(noised), 1, 5),
            scalars_BS=scalars,
            concat_BTChw=noised[:, None].expand(-1, num_frames, -1, -1, -1),
        )


def still(
    x_BTCHW: Tensor, c_noise_B: Tensor, context: Tensor, scalars: Tensor, image_only: Tensor | None
) -> Tensor:
    """The network whose denoised latents are the scaled concat latents, whatever the noise."""
    sigma = torch.exp(4 * c_noise_B)[:, None, None, None, None]
    x, concat = x_BTCHW[:, :, :4] * (1 + sigma**2).sqrt(), x_BTCHW[:, :, 4:]
    target = Averages.scaling_factor * concat
    return (x / (1 + sigma**2) - target) * (1 + sigma**2).sqrt() / sigma


def sample(
    first_frame_BCHW: Tensor,
    config: SampleConfig,
    net: Any = still,
    ordinals: Sequence[int] | None = None,
    **more: Any,
) -> tuple[Tensor, Recorder]:
    recorder = Recorder()
    frames = sample_video(
        net,
        cast(Autoencoder, Averages()),
        cast(Conditioner, recorder),
        first_frame_BCHW,
        NUM_FRAMES,
        config,
        ordinals=ordinals,
        **more,
    )
    return frames, recorder


def first_frames() -> Tensor:
    return (torch.rand(2, 3, 2, 3) * 2 - 1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_network_that_repeats_the_first_frame_gives_a_still_video(sampler: str) -> None:
    first = first_frames()
    config = SampleConfig(
        num_steps=8, sampler=sampler, guidance="constant", guidance_max=1.0, augmentation=0.0
    )
    steps: list[int] = []
    frames, _ = sample(first, config, progress=steps.append)
    assert frames.shape == (2, NUM_FRAMES, 3, 16, 24) and frames.dtype == torch.float32
    torch.testing.assert_close(frames, first[:, None].expand_as(frames), rtol=0, atol=1e-3)
    assert steps == list(range(1, 9))


def test_guidance_rises_over_the_frames() -> None:
    """Unconditional, `still` gives zero: a scale of s gives s times the first frame."""
    first = first_frames()
    frames, _ = sample(first, SampleConfig(num_steps=8, guidance_min=1.0, guidance_max=2.0, augmentation=0.0))
    for frame, scale in enumerate([1.0, 1.5, 2.0]):
        torch.testing.assert_close(frames[:, frame], scale * first, rtol=0, atol=2e-3)


def test_conditioner_is_given_the_settings() -> None:
    config = SampleConfig(
        num_steps=1, fps=7.0, motion_bucket=30.0, augmentation=0.25, scalars={"elevation": 20.0}
    )
    _, recorder = sample(first_frames(), config, captions=["a", "b"])
    assert recorder.given["captions"] == ["a", "b"]
    settings = {"fps": 7.0, "motion_bucket": 30.0, "augmentation": 0.25, "elevation": 20.0}
    for name, value in settings.items():
        assert recorder.given["scalars"][name].tolist() == [value, value]
    assert recorder.given["noise"].std() == pytest.approx(1, abs=0.1)


def test_by_default_a_network_has_the_scalars_of_the_released_one() -> None:
    """Stability-AI/generative-models simple_video_sample.py: fps_id 6, motion_bucket_id 127, cond_aug .02."""
    conditioner = Conditioner.load(ConditionerConfig(), TINY)
    scalars = []

    def net(x: Tensor, c_noise: Tensor, context: Tensor, found: Tensor, image_only: object = None) -> Tensor:
        scalars.append(found)
        return torch.zeros_like(x[:, :, :4])

    autoencoder = Autoencoder.load(TINY)
    sample_video(net, autoencoder, conditioner, torch.zeros(1, 3, 64, 64), 2, SampleConfig(num_steps=1))
    torch.testing.assert_close(scalars[0][0], torch.tensor([6.0, 127.0, 0.02]))


def test_conditioner_is_given_the_last_frame_too() -> None:
    first, last = first_frames(), first_frames()
    _, recorder = sample(first, SampleConfig(num_steps=1), last_frame=last)
    assert torch.equal(recorder.given["last_frame"], last)


def test_start_has_the_largest_sigma() -> None:
    starts = []

    def net(x_BTCHW: Tensor, *_: Any) -> Tensor:
        starts.append(x_BTCHW[:, :, :4])
        return torch.zeros_like(starts[-1])

    sample(first_frames().repeat(1, 1, 4, 4), SampleConfig(num_steps=1), net=net)
    assert starts[0].std() == pytest.approx(
        1, abs=0.05
    )  # c_in times noise of standard deviation sqrt(1 + 700^2)


def test_video_depends_on_seed_and_ordinal_alone() -> None:
    first, config = first_frames(), SampleConfig(num_steps=3)
    both, _ = sample(first, config)
    second, _ = sample(first[1:], config, ordinals=[1])
    torch.testing.assert_close(second, both[1:])
    assert not torch.allclose(sample(first[1:], config, ordinals=[2])[0], second)
    assert not torch.allclose(sample(first, SampleConfig(num_steps=3, seed=1))[0], both)


@pytest.mark.parametrize(
    "fields",
    [{"num_steps": 0}, {"sampler": "ddim"}, {"guidance": "cubic"}, {"sigma_min": 800.0}, {"fps": 0.0}],
)
def test_wrong_settings_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        SampleConfig(**fields)
    name, value = next(iter(fields.items()))
    assert name in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize(
    ("scalars", "sentence"),
    [
        ({"zoom": 1.0}, "sampling.scalars names zoom: it must be one of elevation"),
        ({"fps": 7.0}, "sampling.scalars names fps: sampling.fps must be set instead"),
        ({"elevation": 91}, "sampling.scalars.elevation is 91: it must be at least -90 and at most 90"),
    ],
)
def test_wrong_scalars_are_refused_by_config_key(scalars: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        SampleConfig(scalars=scalars)


def test_size_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"20x24.* multiples of 8"):
        sample(torch.zeros(1, 3, 20, 24), SampleConfig())


def test_public_pipeline_samples_the_same_video() -> None:
    """diffusers' StableVideoDiffusionPipeline with the shipped tiny weights, from the same noise."""
    from diffusers import StableVideoDiffusionPipeline

    image = torch.randint(256, (64, 96, 3), dtype=torch.uint8)
    first = image.permute(2, 0, 1)[None].float() / 127.5 - 1
    config = SampleConfig(num_steps=4, augmentation=0.0, guidance_max=3.0)
    pipeline = load_pipeline(TINY, torch.device("cpu"), torch.float32)
    assert (pipeline.num_frames, pipeline.height, pipeline.width) == (14, *RELEASED_SIZE)
    assert pipeline.sampling == SampleConfig()
    ours = sample_video(
        pipeline.unet, pipeline.autoencoder, pipeline.conditioner, first, num_frames=5, config=config
    )

    theirs = StableVideoDiffusionPipeline.from_pretrained(str(TINY), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    frames = theirs(
        Image.fromarray(image.numpy()),
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=4,
        fps=7,
        noise_aug_strength=0.0,
        latents=draw(0, [0], (5, 4, 8, 12), (1, 3, 64, 96)).noise_BTChw,
        output_type="pt",
    ).frames
    torch.testing.assert_close(ours, 2 * frames - 1, rtol=0, atol=1e-4)


def write_run(folder: Path, frozen: str) -> Path:
    """A run's folder as far as sampling reads it, around the tiny weights."""
    shutil.copytree(TINY / "unet", folder / "checkpoints" / "step-0000001")
    settings = {
        "frozen": {"path": frozen},
        "conditioning": asdict(ConditionerConfig(scalars=("fps", "motion_bucket", "augmentation"))),
        "data": {"num_frames": 5, "height": 64, "width": 96},
        "sampling": asdict(PreviewConfig(num_steps=3, sigma_max=80.0, fps=5.0)),
    }
    settings["conditioning"]["scalars"] = list(settings["conditioning"]["scalars"])
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "checkpoints" / "step-0000001"


@pytest.mark.parametrize("frozen", ["tiny", str(TINY)])
def test_frozen_parts_and_shape_of_a_checkpoint_are_read_from_its_run(tmp_path: Path, frozen: str) -> None:
    pipeline = load_pipeline(write_run(tmp_path / "run", frozen), torch.device("cpu"), torch.float32)
    assert (pipeline.num_frames, pipeline.height, pipeline.width) == (5, 64, 96)
    assert pipeline.autoencoder.downsampling == 8
    assert pipeline.conditioner.config == ConditionerConfig()
    assert pipeline.sampling == SampleConfig(num_steps=3, sigma_max=80.0, fps=5.0), "as its previews"


def test_kernels_that_fail_are_replaced_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"fused": "", "triton": "", "sdpa": ""}
    monkeypatch.setattr(trial, "run_trials", lambda *arguments: fine | {"fused": "no compiler"})
    pipeline = load_pipeline(TINY, torch.device("cpu"), torch.float32)
    assert pipeline.notes == (
        "torch's kernels replace Triton's group norm and GEGLU, which cannot be used on this machine: "
        "no compiler",
    )
    kernels = {module.kernels for module in pipeline.unet.modules() if isinstance(module, FeedForward)}
    assert kernels == {"torch"}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pipeline(tmp_path / "nowhere", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"neither config\.yaml nor vae/"):
        load_pipeline(TINY / "unet", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"- 1\n"])
def test_damaged_config_of_a_run_is_read_from_its_copy(tmp_path: Path, content: bytes) -> None:
    checkpoint = tmp_path / "checkpoints/step-0000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        run_settings(checkpoint)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/config.yaml").write_text("a: 1\n")
    assert run_settings(checkpoint) == run_settings(tmp_path) == {"a": 1}
