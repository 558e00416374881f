"""tools/convert.py: runs are converted to files that the public code loads, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from svd_ds.model.lora import LoraConfig, add_lora, merge_lora
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.sample import TINY
from svd_ds.weights.io import load_unet, save_unet
from svd_ds.weights.lora import lora_state
from tests.networks import seal

SMALL = UNetConfig(
    widths=(32,), attention_levels=(True,), num_layers=1, head_width=32, context_width=64, scalar_width=32
)
Convert = Callable[..., int]


@pytest.fixture
def convert(run_tool: Convert) -> Convert:
    return partial(run_tool, "convert.py")


def make_run(folder: Path, config: UNetConfig = SMALL, **conditioning: Any) -> dict[str, UNet]:
    """Write a run folder with one checkpoint of one rank: `raw` weights and the average `power-0.050`."""
    checkpoint = folder / "checkpoints" / "step-0000007"
    unets = {}
    for which, name in (("raw", "unet"), ("power-0.050", "ema-power-0.050")):
        unets[which] = unet = UNet(config)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        slices = {name: p.detach().flatten() for name, p in unet.named_parameters()}
        (checkpoint / name).mkdir(parents=True)
        save_file(slices, checkpoint / name / "rank-00000-of-00001.safetensors")
    (checkpoint / "unet" / "config.json").write_text(json.dumps(asdict(config)))
    seal(checkpoint)
    signals = {"context": "image", "concat": "image", "scalars": ["fps", "motion_bucket", "augmentation"]}
    settings = {"frozen": {"path": "tiny"}, "conditioning": signals | conditioning}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return unets


def assert_same(found: UNet, expected: UNet) -> None:
    assert found.config == expected.config
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_run_becomes_a_pipeline_that_diffusers_runs(convert: Convert, tmp_path: Path) -> None:
    from diffusers import StableVideoDiffusionPipeline

    unets = make_run(tmp_path / "run")
    assert convert(tmp_path / "run", tmp_path / "deep" / "pipeline", "--layout", "diffusers") == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pipeline"], "no drafts are left"
    assert_same(load_unet(tmp_path / "deep" / "pipeline"), unets["power-0.050"])

    pipeline = StableVideoDiffusionPipeline.from_pretrained(str(tmp_path / "deep" / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    video = pipeline(image, height=64, width=64, num_frames=2, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 2, 3, 64, 64)
    assert video.isfinite().all()


def test_lora_adapters_are_merged_or_written_separately(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = make_run(tmp_path / "run")["raw"]
    checkpoint, lora = tmp_path / "run" / "checkpoints" / "step-0000007", LoraConfig(rank=2, alpha=4.0)
    assert convert(tmp_path / "run", tmp_path / "lora.safetensors", "--layout", "lora") == 2
    assert "the network has no adapters" in capsys.readouterr().err

    names = add_lora(unet, lora)
    adapters = {name: p for name, p in unet.named_parameters() if name in names}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    for folder, parameters in (("unet", unet.named_parameters()), ("ema-power-0.050", adapters.items())):
        slices = {name: p.detach().flatten() for name, p in parameters}
        save_file(slices, checkpoint / folder / "rank-00000-of-00001.safetensors")
    (checkpoint / "unet" / "lora.json").write_text(json.dumps(asdict(lora)))
    seal(checkpoint)

    assert convert(tmp_path / "run", tmp_path / "lora.safetensors", "--layout", "lora") == 0
    written = load_file(tmp_path / "lora.safetensors")
    expected = lora_state(unet)
    assert expected and all(torch.equal(written[key], tensor) for key, tensor in expected.items())
    merge_lora(unet)
    assert convert(tmp_path / "run", tmp_path / "merged.safetensors", "--layout", "original") == 0
    assert_same(load_unet(tmp_path / "merged.safetensors"), unet)
    assert_same(load_unet(tmp_path / "run"), unet)


def test_lora_file_is_merged_by_convert_and_sample(
    convert: Convert, run_tool: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = make_run(tmp_path / "run")["raw"]
    name = "unet.mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_out.0.lora"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    lora = tmp_path / "lora.safetensors"
    save_file({f"{name}.down.weight": down, f"{name}.up.weight": up}, lora)
    options = ("--layout", "original", "--ema", "raw", "--lora", lora, "--lora-scale", "0.5")
    assert convert(tmp_path / "run", tmp_path / "merged.safetensors", *options) == 0
    unet.middle[0].transformer.temporal[0].attention.out.weight.data += 0.5 * up @ down
    found = load_unet(tmp_path / "merged.safetensors")
    for theirs, ours in zip(found.parameters(), unet.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)

    save_file({"lora_te_x.lora_down.weight": down}, lora)
    assert convert(tmp_path / "run", tmp_path / "x.safetensors", *options) == 2
    assert "adapts no linear layer of this network" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    sampled = ("--image", tmp_path / "a.png", "--out", tmp_path / "out", "--lora", lora, "--device", "cpu")
    assert run_tool("sample.py", tmp_path / "run", *sampled) == 2
    assert "adapts no linear layer of this network" in capsys.readouterr().err


def test_conversion_round_trip_is_bit_exact(convert: Convert, tmp_path: Path) -> None:
    unets = make_run(tmp_path / "run")
    first, folder, last = tmp_path / "a.safetensors", tmp_path / "pipeline", tmp_path / "b.safetensors"
    assert convert(tmp_path / "run", first, "--layout", "original", "--ema", "raw") == 0
    assert_same(load_unet(first), unets["raw"])
    assert convert(first, folder, "--layout", "diffusers", "--frozen", TINY) == 0
    assert convert(folder, last, "--layout", "original") == 0
    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_to_video_run_gives_only_its_network(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, in_channels=4, num_scalars=2)
    make_run(tmp_path / "run", config, context="text", concat="none", scalars=["fps", "motion_bucket"])
    assert convert(tmp_path / "run", tmp_path / "out", "--layout", "diffusers") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unet"]
    assert "unet/ alone" in capsys.readouterr().out
    assert load_unet(tmp_path / "out").config == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{full}", "--layout", "diffusers"], "full already exists"),
        (["{run}", "svd.ckpt", "--layout", "original"], "svd.ckpt must end in .safetensors"),
        (
            ["{run}", "{out}", "--layout", "diffusers", "--ema", "best"],
            "has no weights 'best': they must be one of raw, power-0.050, or a length",
        ),
        (["{run}", "{out}", "--layout", "diffusers", "--frozen", "{full}"], "has no model_index.json"),
        (["{run}/nothing", "{out}", "--layout", "diffusers"], "nothing does not exist"),
        (["{weights}", "{out}", "--layout", "diffusers"], "weights only: give a folder"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(
    convert: Convert,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    paths = {name: tmp_path / name for name in ("run", "full", "out", "weights")}
    unets = make_run(paths["run"])
    save_unet(unets["raw"], paths["weights"])
    paths["full"].mkdir()
    (paths["full"] / "something").touch()
    assert convert(*(argument.format(**paths) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not paths["out"].exists()


def test_image_model_is_not_accepted_as_a_video_model(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Heads and scalars as wide as in the public models: a file without our metadata is read by its shapes.
    public = replace(SMALL, widths=(64,), head_width=64, scalar_width=256)
    save_unet(UNet(public), tmp_path / "video.safetensors", "original")
    tensors = load_file(tmp_path / "video.safetensors")
    image = {name: tensor for name, tensor in tensors.items() if "time_" not in name or "time_embed." in name}
    save_file(image, tmp_path / "image.safetensors")
    assert convert(tmp_path / "image.safetensors", tmp_path / "x.safetensors", "--layout", "original") == 2
    assert "it is an image model" in capsys.readouterr().err
