"""Every experiment has the paper's numbers (arXiv 2311.15127; the yaml names sections), and its size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from svd_ds.command_line import CONF
from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise
from svd_ds.model.decoder import Decoder, DecoderConfig
from svd_ds.model.lora import LoraConfig, add_lora
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.training.optim import learning_rate, parameter_groups
from svd_ds.training.usage import unet_forward_flops

SITE = ["data.path=data/quickstart", "frozen.path=tiny", "init.from=runs/before"]
"""What an experiment leaves to the site."""
TEXT, IMAGE = ("text", "none"), ("image", "image")
FPS_MOTION = ("fps", "motion_bucket")
RELEASED = (*FPS_MOTION, "augmentation")
POWER = ("power-0.050", "power-0.100")
CONSTANT = ("decay-0.9999",)
OF_IMAGES, OF_TEXT, OF_AN_IMAGE = 865_910_724, 1_524_283_882, 1_524_623_082

MEMBERS = tuple(f"noise={path.stem}" for path in sorted((CONF / "noise").glob("*.yaml")))
"""Of the experiment noise_schedule."""


@dataclass(frozen=True)
class Row:
    """What the paper says of a stage, or, where the yaml says that it is silent, what we chose."""

    frames: int
    size: tuple[int, int]
    steps: int
    batch: int
    lr: float
    noise: tuple[float, float]
    """P_mean, P_std."""
    channels: int
    scalars: tuple[str, ...]
    signals: tuple[str, str]
    """What the cross-attention sees, and what joins the input."""
    drops: tuple[float, float]
    """Of the first, and of the second."""
    averages: tuple[str, ...]
    parameters: int
    learning: int | None = None
    """How many of them learn; None: all."""
    rank: int = 0


# fmt: off
STAGES = {
    "stage1_time_embed": Row(1, (512, 512), 1_000, 1536, 1e-4, (-1.2, 1.0), 4, (), TEXT, (0.15, 0), POWER,
                             OF_IMAGES, 2_050_560),
    "stage1": Row(1, (256, 384), 30_000, 1536, 1e-4, (-1.2, 1.0), 4, (), TEXT, (0.15, 0), POWER, OF_IMAGES),
    "stage2": Row(14, (256, 384), 150_000, 1536, 1e-4, (-1.2, 1.0), 4, FPS_MOTION, TEXT, (0.15, 0), POWER,
                  OF_TEXT),
    "stage2_highres": Row(14, (320, 576), 100_000, 768, 1e-4, (0.0, 1.0), 4, FPS_MOTION, TEXT, (0.15, 0),
                          POWER, OF_TEXT),
    "stage3_t2v": Row(14, (576, 1024), 50_000, 768, 3e-5, (0.5, 1.4), 4, FPS_MOTION, TEXT, (0.15, 0),
                      CONSTANT, OF_TEXT),
    "stage3_i2v_base": Row(14, (320, 576), 50_000, 768, 3e-5, (0.7, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                           CONSTANT, OF_AN_IMAGE),
    "stage3_i2v": Row(14, (576, 1024), 50_000, 768, 3e-5, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                      CONSTANT, OF_AN_IMAGE),
    "stage3_i2v_xt": Row(25, (576, 1024), 50_000, 768, 3e-5, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                         CONSTANT, OF_AN_IMAGE),
    "interpolation": Row(5, (576, 1024), 10_000, 256, 1e-4, (1.0, 1.2), 9, RELEASED, ("ends", "ends"),
                         (0.1, 0.1), CONSTANT, 1_524_625_966),
    "camera_lora": Row(14, (576, 1024), 5_000, 16, 1e-4, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1), POWER,
                       OF_AN_IMAGE + 1_597_440, 1_597_440, rank=16),
    "multiview": Row(21, (576, 576), 12_000, 16, 1e-5, (1.0, 1.6), 8, (*RELEASED, "elevation"), IMAGE,
                     (0.1, 0.1), POWER, OF_AN_IMAGE + 256 * 1280),
}
# fmt: on


def experiment(name: str, *overrides: str) -> RunConfig:
    return compose([f"+experiment={name}", *SITE, *overrides])


@cache
def parameters(model: UNetConfig, lora: LoraConfig) -> tuple[dict[str, str], dict[str, torch.Size], set[str]]:
    """Tags and shapes by name, and the adapters' names."""
    with torch.device("meta"):
        unet = UNet(model)
        adapters = set(add_lora(unet, lora))
    return parameter_tags(unet), {name: p.shape for name, p in unet.named_parameters()}, adapters


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_papers_numbers(name: str) -> None:
    config, row = experiment(name), STAGES[name]
    told = config.conditioning
    tags, shapes, adapters = parameters(config.model, config.lora)
    groups = parameter_groups(
        {name: tag for name, tag in tags.items() if not adapters or name in adapters}, shapes, config.optim
    )
    total = sum(math.prod(shape) for shape in shapes.values())
    found = Row(
        frames=config.data.num_frames,
        size=(config.data.height, config.data.width),
        steps=config.run.steps,
        batch=config.batch.size,
        lr=config.optim.lr,
        noise=(config.noise.P_mean, config.noise.P_std),
        channels=config.model.in_channels,
        scalars=told.scalars,
        signals=(told.context, told.concat),
        drops=(told.context_drop_rate, told.concat_drop_rate),
        averages=config.ema.names,
        parameters=total,
        learning=learning if (learning := _learning(groups, shapes)) < total else None,
        rank=config.lora.rank,
    )
    assert found == row
    assert config.noise.kind == "lognormal" and config.optim.gradient_clip == 1.0
    assert config.name == name and config.run.dir == f"runs/{name}"


def _learning(groups: list, shapes: dict[str, torch.Size]) -> int:
    return sum(math.prod(shapes[name]) for group in groups for name in group.members)


@pytest.mark.parametrize("name", STAGES)
def test_the_global_batch_is_the_papers_on_the_usual_numbers_of_ranks(name: str) -> None:
    batch, few = experiment(name).batch, STAGES[name].batch == 16
    for ranks in (1, 2, 4, 8, 16) if few else (8, 16, 32, 64, 128):
        assert ranks * batch.split(ranks).num_micro_batches(0) * batch.micro == STAGES[name].batch
    nodes = re.search(r"--nodes=(\d+)", (CONF / "experiment" / f"{name}.yaml").read_text())
    gpus = 8 * int(nodes[1]) if nodes else 384
    assert experiment(name).evaluation.clips % gpus == 0, "as many on every GPU that its command starts"
    if STAGES[name].batch >= 768:
        assert 384 * batch.split(384).num_micro_batches(0) * batch.micro == STAGES[name].batch, (
            "the paper's 48 x 8"
        )
    tiny = compose([f"+experiment={name}", *SITE, "debug=tiny"]).batch
    assert [tiny.split(ranks).num_micro_batches(0) for ranks in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_ablations_have_the_papers_numbers() -> None:
    for name in ("ablation", "image_pretraining", "captions", "curation"):
        config = experiment(name)
        assert (config.data.num_frames, config.data.height, config.data.width) == (8, 256, 256), name
        assert (config.run.steps, config.batch.size, config.optim.lr) == (40_000, 256, 1e-4), name
        assert config.noise.kind == "discrete" and config.noise.offset_noise > 0, name
        assert config.conditioning.drop_text == 0.1, name
        assert (config.sampling.num_steps, config.sampling.guidance_max) == (50, 12.0), name
        levels = build_noise(config.noise, 256, 256).quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
        sampled = torch.tensor([config.sampling.sigma_min, config.sampling.sigma_max], dtype=torch.float64)
        torch.testing.assert_close(sampled, levels, rtol=2e-3, atol=0)
    assert experiment("captions").data.caption_weights == {"coca": 0.5, "video_blip": 0.25, "llm": 0.25}
    kept = ("motion>=q25", "aesthetic>=q25", "clip_similarity>=q50", "text_area<=q75")
    assert experiment("curation").data.where == kept
    joint = experiment("joint_images")
    assert joint.data.image_share > 0 and joint.conditioning.concat == "none", "else a still is only copied"


@pytest.mark.parametrize("settings", [*STAGES, "ablation", *MEMBERS])
def test_sampling_begins_at_a_sigma_that_is_trained(settings: str) -> None:
    """At the most 4.8 deviations above the mean of a log-normal: EDM's own stands at 4.65."""
    config = experiment("noise_schedule", settings) if settings in MEMBERS else experiment(settings)
    noise = build_noise(config.noise, config.data.height, config.data.width)
    most = noise.quantile(torch.tensor(1 - 1e-6, dtype=torch.float64))
    assert config.sampling.sigma_max <= most * 1.001


@pytest.mark.parametrize("debug", [[], ["debug=tiny"]], ids=["full", "tiny"])
def test_members_of_guidance_sample_the_same_weights(debug: list[str]) -> None:
    config = experiment("guidance", *debug)
    clips = config.run.steps * config.batch.size
    assert {learning_rate(config.optim, seen, clips) for seen in range(1, clips + 1)} == {0.0}


@pytest.mark.parametrize(
    ("name", "drop"),
    [
        ("stage1", "init.from"),
        ("stage2", "init.from"),
        ("stage3_i2v", "frozen.path"),
        ("stage2", "data.path"),
    ],
)
def test_what_is_left_to_the_site_must_be_given(name: str, drop: str) -> None:
    with pytest.raises(ValueError, match=f"{drop} must be given: the "):
        compose([f"+experiment={name}", *(word for word in SITE if not word.startswith(drop))])


def test_every_experiment_says_what_it_is() -> None:
    paths = sorted((CONF / "experiment").glob("*.yaml"))
    assert {path.stem for path in paths} > set(COUNTED)
    for path in paths:
        lines = path.read_text().splitlines()
        header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
        assert "arXiv 23" in header and ("svd_ds.train" in header or "sbatch" in header), path.name
        if path.stem in COUNTED:
            assert "Cost: " in header, path.name


A100_PEAK, A100_PEAK_TF32 = 312e12, 156e12
SHARE, RECOMPUTED = 0.4, 4 / 3
COUNTED = (*STAGES, "ablation", "temporal_decoder")
"""Those whose headers say what they cost; the other ablations are like one of them, or take minutes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_the_cost_in_the_header_is_that_of_its_operations(name: str) -> None:
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    hours = re.search(
        r"Cost: ([\d,]+) A100 hours by counted operations at 40 % of the peak( in TF32)?", header
    )
    assert hours is not None
    config = experiment(name, *(["init.from=null"] if name == "temporal_decoder" else []))
    peak = A100_PEAK_TF32 if config.precision == "fp32" else A100_PEAK
    assert bool(hours[2]) == (peak == A100_PEAK_TF32)
    clips = config.run.steps * config.batch.size
    expected = 3 * RECOMPUTED * forward_operations(config) * clips / (SHARE * peak * 3600)
    assert float(hours[1].replace(",", "")) == pytest.approx(expected, rel=0.05)


def forward_operations(config: RunConfig) -> int:
    """Of one clip."""
    data = config.data
    if config.task == "unet":
        num_tokens = config.conditioning.num_tokens
        return unet_forward_flops(config.model, data.num_frames, data.height, data.width, num_tokens)
    # Made on the CPU: diffusers gives its layers' blend a value as it makes them.
    decoder = Decoder(DecoderConfig()).to("meta")
    latents_BTChw = torch.empty(1, data.num_frames, 4, data.height // 8, data.width // 8, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(latents_BTChw)
    return counter.get_total_flops()
