"""Every experiment has the numbers of the paper (arXiv 2311.15127) and the size in its header."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from svd_ds.command_line import CONF
from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise_schedule
from svd_ds.model.lora import LoraConfig, add_lora
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.plan.fit import FITS
from svd_ds.plan.hardware import GPUS, Cluster
from svd_ds.plan.planner import make_plan
from svd_ds.plan.requests import profile_gpu_steps
from svd_ds.training.optim import learning_rate, parameter_groups

REQUIRED = ["data.path=data/quickstart", "frozen.path=tiny", "init.from=runs/before"]
"""Settings that every user must give."""
TEXT, IMAGE = ("text", "none"), ("image", "image")
FPS_MOTION = ("fps", "motion_bucket")
RELEASED = (*FPS_MOTION, "augmentation")
POWER = ("power-0.050", "power-0.100")
CONSTANT = ("decay-0.9999",)
IMAGE_PARAMETERS, TEXT_PARAMETERS, I2V_PARAMETERS = 865_910_724, 1_524_283_882, 1_524_623_082

MEMBERS = tuple(f"noise={path.stem}" for path in sorted((CONF / "noise").glob("*.yaml")))
"""Members of the experiment noise_schedule."""


@dataclass(frozen=True)
class Row:
    """Numbers of a stage in the paper; where the yaml says that the paper gives none, our choice."""

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
    """Input of the cross-attention, and condition that is concatenated to the input."""
    drops: tuple[float, float]
    """Drop rates of the two signals."""
    averages: tuple[str, ...]
    parameters: int
    trained: int | None = None
    """Number of trained parameters; None: all."""
    rank: int = 0


# fmt: off
STAGES = {
    "stage1_time_embed": Row(1, (512, 512), 1_000, 1536, 1e-4, (-1.2, 1.0), 4, (), TEXT, (0.15, 0), POWER,
                             IMAGE_PARAMETERS, 2_050_560),
    "stage1": Row(1, (256, 384), 30_000, 1536, 1e-4, (-1.2, 1.0), 4, (), TEXT, (0.15, 0), POWER,
                  IMAGE_PARAMETERS),
    "stage2": Row(14, (256, 384), 150_000, 1536, 1e-4, (-1.2, 1.0), 4, FPS_MOTION, TEXT, (0.15, 0), POWER,
                  TEXT_PARAMETERS),
    "stage2_highres": Row(14, (320, 576), 100_000, 768, 1e-4, (0.0, 1.0), 4, FPS_MOTION, TEXT, (0.15, 0),
                          POWER, TEXT_PARAMETERS),
    "stage3_t2v": Row(14, (576, 1024), 50_000, 768, 3e-5, (0.5, 1.4), 4, FPS_MOTION, TEXT, (0.15, 0),
                      CONSTANT, TEXT_PARAMETERS),
    "stage3_i2v_base": Row(14, (320, 576), 50_000, 768, 3e-5, (0.7, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                           CONSTANT, I2V_PARAMETERS),
    "stage3_i2v": Row(14, (576, 1024), 50_000, 768, 3e-5, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                      CONSTANT, I2V_PARAMETERS),
    "stage3_i2v_xt": Row(25, (576, 1024), 50_000, 768, 3e-5, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1),
                         CONSTANT, I2V_PARAMETERS),
    "interpolation": Row(5, (576, 1024), 10_000, 256, 1e-4, (1.0, 1.2), 9, RELEASED, ("ends", "ends"),
                         (0.1, 0.1), CONSTANT, 1_524_625_966),
    "camera_lora": Row(14, (576, 1024), 5_000, 16, 1e-4, (1.0, 1.6), 8, RELEASED, IMAGE, (0.1, 0.1), POWER,
                       I2V_PARAMETERS + 1_597_440, 1_597_440, rank=16),
    "multiview": Row(21, (576, 576), 12_000, 16, 1e-5, (1.0, 1.6), 8, (*RELEASED, "elevation"), IMAGE,
                     (0.1, 0.1), POWER, I2V_PARAMETERS + 256 * 1280),
}
# fmt: on


def experiment(name: str, *overrides: str) -> RunConfig:
    return compose([f"+experiment={name}", *REQUIRED, *overrides])


@cache
def parameters(model: UNetConfig, lora: LoraConfig) -> tuple[dict[str, str], dict[str, torch.Size], set[str]]:
    """Return tags and shapes by parameter name, and the names of the adapters."""
    with torch.device("meta"):
        unet = UNet(model)
        adapters = set(add_lora(unet, lora))
    return parameter_tags(unet), {name: p.shape for name, p in unet.named_parameters()}, adapters


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_the_numbers_of_the_paper(name: str) -> None:
    config, row = experiment(name), STAGES[name]
    conditioning = config.conditioning
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
        scalars=conditioning.scalars,
        signals=(conditioning.context, conditioning.concat),
        drops=(conditioning.context_drop_rate, conditioning.concat_drop_rate),
        averages=config.ema.names,
        parameters=total,
        trained=trained if (trained := _num_trained(groups, shapes)) < total else None,
        rank=config.lora.rank,
    )
    assert found == row
    assert config.noise.kind == "lognormal" and config.optim.gradient_clip == 1.0
    assert config.name == name and config.run.dir == f"runs/{name}"


def _num_trained(groups: list, shapes: dict[str, torch.Size]) -> int:
    return sum(math.prod(shapes[name]) for group in groups for name in group.parameter_names)


@pytest.mark.parametrize("name", STAGES)
def test_global_batch_is_that_of_the_paper_on_usual_numbers_of_ranks(name: str) -> None:
    batch, size = experiment(name).batch, STAGES[name].batch
    usual = (1, 2, 4, 8, 16) if size == 16 else (8, 16, 32, 64, 128)
    for ranks in (*usual, *([384] if size >= 768 else [])):  # the paper's 48 x 8
        split = batch.split(ranks)
        assert ranks * split.num_micro_batches(0) * split.micro[0] == size
    nodes = re.search(r"--nodes=(\d+)", (CONF / "experiment" / f"{name}.yaml").read_text())
    gpus = 8 * int(nodes[1]) if nodes else 384
    assert experiment(name).evaluation.clips % gpus == 0, "equally many on every GPU that its command starts"
    tiny = compose([f"+experiment={name}", *REQUIRED, "debug=tiny"]).batch
    assert [tiny.split(ranks).num_micro_batches(0) for ranks in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_ablations_have_the_numbers_of_the_paper() -> None:
    for name in ("ablation", "image_pretraining", "captions", "curation"):
        config = experiment(name)
        assert (config.data.num_frames, config.data.height, config.data.width) == (8, 256, 256), name
        assert (config.run.steps, config.batch.size, config.optim.lr) == (40_000, 256, 1e-4), name
        assert config.noise.kind == "discrete" and config.noise.offset_noise > 0, name
        assert config.conditioning.drop_text == 0.1, name
        assert (config.sampling.num_steps, config.sampling.guidance_max) == (50, 12.0), name
        levels = build_noise_schedule(config.noise, 256, 256).quantile(
            torch.tensor([0.0, 1.0], dtype=torch.float64)
        )
        sampled = torch.tensor([config.sampling.sigma_min, config.sampling.sigma_max], dtype=torch.float64)
        torch.testing.assert_close(sampled, levels, rtol=2e-3, atol=0)
    assert experiment("captions").data.caption_weights == {"coca": 0.5, "video_blip": 0.25, "llm": 0.25}
    kept = ("motion>=q25", "aesthetic>=q25", "clip_similarity>=q50", "text_area<=q75")
    assert experiment("curation").data.where == kept
    joint = experiment("joint_images")
    assert joint.data.image_share > 0 and joint.conditioning.concat == "none", (
        "otherwise a still would only be copied"
    )


@pytest.mark.parametrize("settings", [*STAGES, "ablation", *MEMBERS])
def test_sampling_begins_at_a_trained_sigma(settings: str) -> None:
    """At most 4.8 standard deviations above the mean of a log-normal; EDM's own sigma_max is at 4.65."""
    config = experiment("noise_schedule", settings) if settings in MEMBERS else experiment(settings)
    noise = build_noise_schedule(config.noise, config.data.height, config.data.width)
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
def test_required_settings_must_be_given(name: str, drop: str) -> None:
    with pytest.raises(ValueError, match=f"{drop} must be given: the "):
        compose([f"+experiment={name}", *(word for word in REQUIRED if not word.startswith(drop))])


COUNTED = (*STAGES, "ablation", "temporal_decoder")
"""Experiments with their cost in the header; the other ablations are like one of them, or take minutes."""
COST = re.compile(
    r"Cost: (?P<hours>[\d,]+) A100 hours on (?P<nodes>\d+) nodes?(?:, MFU (?P<mfu>\d+) %)?"
    r"(?: \((?P<cached>[\d,]+) with the latent cache\))?"
    r", planned by tools/plan\.py; [\d.,]+ (M )?(clips|images)"
)


def header_cost(name: str) -> dict[str, str | None]:
    """Fields of the line with the cost in the header of an experiment."""
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    found = COST.search(header)
    assert found is not None, header
    return found.groupdict()


def test_every_experiment_has_source_command_and_cost() -> None:
    paths = sorted((CONF / "experiment").glob("*.yaml"))
    assert {path.stem for path in paths} > set(COUNTED)
    for path in paths:
        lines = path.read_text().splitlines()
        header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
        assert "arXiv 23" in header and ("svd_ds.train" in header or "sbatch" in header), path.name


@pytest.mark.parametrize("name", COUNTED)
def test_cost_is_for_the_nodes_of_the_command(name: str) -> None:
    cost = header_cost(name)
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    asked = re.search(r"--nodes=(\d+)", text)
    script = re.search(r"sbatch .*(slurm/stage\d\.sh)", text)
    if asked is not None or script is not None:
        lines = (CONF.parent / script[1]).read_text() if script is not None else ""
        nodes = asked[1] if asked is not None else re.findall(r"#SBATCH --nodes=(\d+)", lines)[0]
        assert cost["nodes"] == nodes
    config = compose([f"+experiment={name}"], placeholder="planned")
    config.batch.split(8 * int(cost["nodes"] or 0))
    assert (cost["cached"] is None) == (cost["mfu"] is None) == (config.task == "decoder")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_run_fits_80_gb_and_its_cost_is_the_planned_one(name: str) -> None:
    cost, gpu = header_cost(name), GPUS["a100-80"]
    config = compose([f"+experiment={name}"], placeholder="planned")
    cluster = Cluster(gpu, 8 * int(cost["nodes"] or 0), 8, gpu.node_network)
    plan = make_plan(config, cluster, profile_gpu_steps, [config.recompute])
    assert plan.peak.option.verdict == FITS
    planned = {"hours": plan.cost.gpu_hours, "cached": plan.cached_cost.gpu_hours}
    if (mfu := plan.peak.option.speed.mfu) is not None:
        planned["mfu"] = 100 * mfu
    for field, value in planned.items():
        if (text := cost[field]) is not None:
            # The shares of the peaks are rough; a plan that changes by more needs new headers.
            assert float(text.replace(",", "")) == pytest.approx(value, rel=0.05, abs=0.5), field
