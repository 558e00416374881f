"""The paper's stages in order, minutes-small: each starts from the run of the one before, on one rank."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from svd_ds.command_line import CONF
from svd_ds.compose import compose
from svd_ds.data.writer import ShardWriter
from svd_ds.evaluation.fixed_set import rank_runs
from svd_ds.evaluation.report import write_report
from svd_ds.evaluation.runs import read_run
from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.parallel.env import Env
from svd_ds.weights.io import load_unet
from tests.videos import encode, moving_square, sample_metadata

ROOT = Path(__file__).parents[2]
SMALL = (
    "run.steps=2",
    "batch.size=2",
    "sampling.every=2",
    "sampling.num_steps=1",
    "logger.wandb=disabled",
    "precision=fp32",
)
CAPTIONS = dict.fromkeys(("coca", "video_blip", "llm"), "a square moves")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that are long enough for every experiment, with every annotation that one of them needs."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    writer = ShardWriter(folder)
    for i in range(4):
        frames = moving_square(25, height=64, width=64, seed=i)
        annotations = {"aesthetic": float(i), "clip_similarity": float(i), "text_area": 1.0 - i}
        more = {"captions": CAPTIONS, "annotations": annotations}
        writer.add(f"clip{i}", "mp4", encode(frames), sample_metadata(frames, motion=0.01 * (i + 1)) | more)
    writer.close()
    return folder


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.tiny.stage_inputs import write_image_model

    folder = tmp_path_factory.mktemp("weights") / "unet"
    write_image_model(folder)
    return folder


@pytest.fixture
def train(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return train(experiment, *overrides): two steps in this process; it returns the run folder."""
    monkeypatch.chdir(ROOT)

    def start(experiment: str, *overrides: str) -> Path:
        from svd_ds.run import run

        settings = (f"+experiment={experiment}", "debug=tiny", f"data.path={clips}", *SMALL, *overrides)
        folder = tmp_path / compose(settings).name
        run(compose([*settings, f"run.dir={folder}"]), Env.read({}))
        return folder

    return start


def assert_grown(after: UNet, before: UNet) -> None:
    """Check that `after` has all weights of `before`, and zeros in its new inputs and tensors."""
    old = dict(before.named_parameters())
    for name, p in after.named_parameters():
        known = old.pop(name, p[..., :0])
        inputs = known.shape[-1]
        assert torch.equal(p[..., :inputs], known) and not p[..., inputs:].any(), name
    assert not old, "weights are missing"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_network_grows_from_stage_to_stage_and_keeps_its_weights(
    train: Callable[..., Path], image_model: Path
) -> None:
    """The network grows by temporal layers and scalars, by inputs and a scalar, and by a mask."""
    image = train("stage1", f"init.from={image_model}")
    # A run in bfloat16 saves the parameters that it does not train in float32.
    settings = ("temporal=videoldm", "checkpoint.every=1", "precision=bf16")
    text = train("stage2", f"init.from={image}", "init.which=raw", *settings)
    before, after = load_unet(image, "raw"), load_unet(text, "raw")
    tags, found = parameter_tags(after), dict(after.named_parameters())
    handed_over = dict(before.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in handed_over.items()), (
        "all weights are kept, because they are frozen"
    )
    earlier = dict(load_unet(text / "checkpoints/step-0000001", "raw").named_parameters())
    assert {tags[name] for name in found.keys() - handed_over.keys()} == {"temporal", "condition"}
    moved = {tags[name] for name, p in found.items() if not torch.equal(p, earlier[name])}
    assert moved == {"temporal", "condition"}, "only the layers of VideoLDM are trained"

    video = train("stage3_i2v_base", f"init.from={text}", "optim.schedule=zero")
    assert_grown(load_unet(video), load_unet(text))
    assert load_unet(video).config.in_channels == 8 and load_unet(video).config.num_scalars == 3

    between = train("interpolation", f"init.from={video}", "optim.schedule=zero")
    assert_grown(load_unet(between), load_unet(video))
    assert load_unet(between).config.in_channels == 9 and load_unet(between).config.masked

    camera = load_unet(train("camera_lora", f"init.from={video}", "precision=bf16"), "raw", merge=False)
    adapted = dict(camera.named_parameters())
    assert all(torch.equal(p, adapted[name]) for name, p in load_unet(video).named_parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_complete_chain_ends_in_a_diffusers_pipeline(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableVideoDiffusionPipeline

    def tool(name: str, *arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))  # as for any script, modules next to it are found
    tool("chain.py", tmp_path, *SMALL, "--data", clips)
    for stage in runpy.run_path(str(ROOT / "tools/chain.py"))["CHAIN"]:
        assert (tmp_path / stage / "checkpoints/step-0000002/COMPLETE").exists(), stage

    for end in ("stage3_i2v_xt", "camera_lora"):
        tool("convert.py", tmp_path / end, tmp_path / f"{end}-pipeline", "--layout", "diffusers")
        pipeline = StableVideoDiffusionPipeline.from_pretrained(str(tmp_path / f"{end}-pipeline"))
        image = Image.effect_noise((64, 64), 50).convert("RGB")
        frames = pipeline(
            image, height=64, width=64, num_frames=3, num_inference_steps=1, output_type="pt"
        ).frames
        assert frames.shape == (1, 3, 3, 64, 64) and frames.isfinite().all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_other_experiment_trains(train: Callable[..., Path]) -> None:
    """Train each experiment that is no stage on its own; guidance samples the weights of another."""
    stages = runpy.run_path(str(ROOT / "tools/chain.py"))["CHAIN"]
    runs = {name: train(name) for name in sorted(set(EXPERIMENTS) - stages.keys() - {"guidance"})}
    for name, run in runs.items():
        assert (run / "checkpoints/step-0000002/COMPLETE").exists(), name
    weights = runs["noise_schedule"]
    sampled = train("guidance", f"init.from={weights}", "init.which=raw")
    raw = [load_unet(run, "raw").parameters() for run in (weights, sampled)]
    assert all(torch.equal(one, other) for one, other in zip(*raw, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_noise_schedule_trains_and_one_report_ranks_them(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    members = sorted(path.stem for path in (CONF / "noise").glob("*.yaml"))
    runs = [train("noise_schedule", f"noise={member}", "evaluation.clips=1") for member in members]
    ranking = rank_runs([read_run(run) for run in runs])
    assert ranking is not None and len(ranking.entries) == len(members), "all were measured on one set"
    write_report(runs, tmp_path / "compare.html")
    html = (tmp_path / "compare.html").read_text()
    assert "Ranking" in html and all(member in html for member in members)
