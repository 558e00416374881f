"""Inputs of a run: latents, the fixed set, the stage that it starts from, and conditions that fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from svd_ds.checks import check_config_fits
from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.data.latents import MEMBER, LatentsOrigin, pack
from svd_ds.data.writer import ShardWriter
from svd_ds.inputs import Inputs, read_inputs
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.model.unet import UNet
from svd_ds.parallel.env import Env
from svd_ds.sample import TINY
from svd_ds.training.evaluate import FixedSet
from svd_ds.weights.io import save_unet
from tests.videos import encode, moving_square, sample_metadata


def write(folder: Path, autoencoder: str) -> None:
    frames = moving_square(6, height=64, width=64)
    moments = torch.zeros(6, 8, 8, 8)
    writer = ShardWriter(folder)
    writer.add(
        "a",
        "mp4",
        encode(frames),
        sample_metadata(frames),
        {
            MEMBER: pack(
                moments, torch.from_numpy(frames).permute(0, 3, 1, 2), LatentsOrigin(64, 64, autoencoder)
            )
        },
    )
    writer.close()


def test_latents_of_another_autoencoder_are_refused_with_both(tmp_path: Path) -> None:
    data = [f"data.path={tmp_path / 'data'}", "data.latents=true", "data.crop=center"]
    config = compose(["debug=tiny", f"run.dir={tmp_path / 'run'}", *data])
    env = replace(Env.read({}), device=torch.device("cpu"))
    ours = Autoencoder.load(TINY).fingerprint()

    write(tmp_path / "data", ours)
    inputs = read_inputs(config, env, None)
    batch, _ = next(iter(inputs.loader))
    assert batch.frames_BTCHW.shape[1] == 1 and batch.num_frames == 6
    assert inputs.preview_clips.clips.frames_BTCHW.shape[1] == 6, "a preview shows more frames than its own"

    (tmp_path / "data" / "index.jsonl").unlink()
    write(tmp_path / "data", "0123456789ab")
    with pytest.raises(
        ValueError, match=f"the autoencoder 0123456789ab, and that in frozen.path=tiny is {ours}"
    ):
        read_inputs(config, env, None)


def test_fixed_set_is_the_same_in_every_run_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, seeds in (("data", range(5)), ("held_out", range(9, 12))):
        writer = ShardWriter(tmp_path / folder)
        for seed in seeds:
            frames = moving_square(8, height=64, width=80, seed=seed)
            writer.add(f"clip{seed}", "mp4", encode(frames), sample_metadata(frames, motion=0.1 * (seed + 1)))
        writer.close()

    def fixed_set(rank: int, world: int, *overrides: str) -> FixedSet:
        data = (f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "batch.size=2")
        config = compose(["debug=tiny", *data, *overrides])
        found = read_inputs(config, replace(CPU, rank=rank, world=world), None).fixed_set
        assert found is not None
        return found

    whole = fixed_set(0, 1)
    assert whole.clips.ordinals == (0, 1, 2)
    another = (
        "run.seed=5",
        "noise=edm",
        "data.where=['motion>=0.35']",
        "data.image_share=1",
        "data.flip=true",
        "data.caption_weights={coca: 1.0}",
    )
    parts = [fixed_set(rank, 2, *another) for rank in range(2)]
    assert [part.clips.ordinals for part in parts] == [(0, 2), (1, 3)], "equally many; the fourth is spare"
    assert {part.data for part in parts} == {whole.data}
    for part, rows in zip(parts, ([0, 2], [1]), strict=True):
        seen = part.clips.select(range(len(rows)))
        assert torch.equal(seen.frames_BTCHW, whole.clips.select(rows).frames_BTCHW)
    held_out = fixed_set(0, 1, f"evaluation.path={tmp_path / 'held_out'}")
    assert set(held_out.clips.ids) == {"clip9", "clip10", "clip11"}
    assert held_out.data != whole.data != fixed_set(0, 1, "data.height=32").data
    monkeypatch.setattr(Autoencoder, "fingerprint", lambda self: "another")
    assert fixed_set(0, 1).data != whole.data, "errors on other latents are not comparable"


CPU = replace(Env.read({}), device=torch.device("cpu"))


def stage(folder: Path, *overrides: str) -> RunConfig:
    """Write a config, and the weights of a run with it, to `folder`."""
    config = compose(["debug=tiny", *overrides])
    folder.mkdir()
    save_unet(UNet(config.model), folder / "weights.safetensors", "original")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    return config


IMAGES = ("model=svd_t2v", "model.num_scalars=0", "temporal=none", "conditioning=text_to_video")
IMAGES_ALONE = (*IMAGES, "conditioning.scalars=[]")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            ("conditioning.scalars=[fps,motion_bucket,augmentation]",),
            ("conditioning.scalars=[motion_bucket,fps,augmentation]",),
            "takes the scalars fps, motion_bucket, augmentation, and .* is motion_bucket, fps, augmentation",
        ),
        (
            (),
            ("model=svd_t2v", "conditioning=text_to_video"),
            "model.in_channels is 4, and the weights at .* have 8: it must be at least 8",
        ),
        (
            ("model=svd_interpolation", "conditioning=interpolation"),
            (),
            "model.in_channels is 8, and the weights at .* have 9: it must be at least 9",
        ),
        (("model.context_width=32",), (), "model.context_width is 64, .* have 32: it must be the same"),
        (IMAGES_ALONE, ("optim.temporal_lr_scale=0",), "optim.temporal_lr_scale=0 freezes temporal layers"),
        (IMAGES_ALONE, ("optim.condition_lr_scale=0",), "condition_lr_scale=0 freezes condition layers"),
        (IMAGES_ALONE, ("lora.rank=4",), "lora.rank freezes .* layers that would begin at random"),
        (
            ("model=svd_t2v", "conditioning=text_to_video"),
            ("optim.spatial_lr_scale=0",),
            "spatial layers .* ignore the new channels, .* 4 input channels and model.in_channels is 8",
        ),
        ((), ("init.which=power-0.050",), "not a run or a checkpoint, so it has no average 'power-0.050'"),
        ((), IMAGES_ALONE, "model.temporal is none, and the weights at .* have svd"),
    ],
)  # fmt: skip
def test_wrong_order_of_stages_is_refused(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...], message: str
) -> None:
    stage(tmp_path / "before", *before)
    start = [f"init.from={tmp_path / 'before' / 'weights.safetensors'}", f"run.dir={tmp_path / 'after'}"]
    with pytest.raises(ValueError, match=message):
        read_inputs(compose(["debug=tiny", *start, *after]), CPU, None)


def test_video_stage_starts_from_the_image_stage(tmp_path: Path) -> None:
    stage(tmp_path / "before", *IMAGES_ALONE)
    start = [f"init.from={tmp_path / 'before' / 'weights.safetensors'}", f"run.dir={tmp_path / 'after'}"]
    inputs = read_inputs(compose(["debug=tiny", *start]), CPU, None)
    assert inputs.weights is not None
    taken = {name: tensor.shape for name, tensor in inputs.weights}
    assert taken["conv_in.weight"][-1] == 8, "widened"
    assert not any("temporal" in name or "scalars" in name for name in taken)


def test_image_network_without_scalars_accepts_any_new_ones(tmp_path: Path) -> None:
    stage(tmp_path / "before", *IMAGES_ALONE)
    (tmp_path / "before" / "config.yaml").unlink()
    start = [f"init.from={tmp_path / 'before' / 'weights.safetensors'}", f"run.dir={tmp_path / 'after'}"]
    words = ["conditioning.scalars=[motion_bucket]", "model.num_scalars=1"]
    assert read_inputs(compose(["debug=tiny", *start, *words]), CPU, None).weights is not None


def test_images_and_videos_have_networks_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.num_frames is 1 and model.temporal is svd: it must be none for images"
    ):
        read_inputs(compose(["debug=tiny", "data.num_frames=1", f"run.dir={tmp_path}"]), CPU, None)


def test_randomly_initialised_parameters_are_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.embedding_lr_scale=0 freezes .* init.from is null"):
        read_inputs(compose(["debug=tiny", "temporal=videoldm", f"run.dir={tmp_path}"]), CPU, None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "data", "0123456789ab")
    config = compose(["debug=tiny", f"run.dir={folder / 'run'}", f"data.path={folder / 'data'}"])
    return read_inputs(config, CPU, None)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["conditioning=interpolation"],
            "model.in_channels is 8, but 4 latent channels and conditioning.concat=ends make 9",
        ),
        (
            ["conditioning=interpolation", "model.in_channels=9"],
            "model.masked is false and conditioning.concat is ends",
        ),
        (["model.masked=true"], "model.masked is true and conditioning.concat is image"),
        (
            ["conditioning=interpolation", "model=svd_interpolation", "data.num_frames=2"],
            "data.num_frames is 2: with the first and the last frame as conditions",
        ),
        (
            ["conditioning=multiview", "model.num_scalars=3"],
            "model.num_scalars is 3, but conditioning.scalars names 4: fps, motion_bucket, augm",
        ),
        (
            ["conditioning=multiview"],
            'does not have: its json needs the key "elevation"',
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(inputs: Inputs, overrides: list[str], sentence: str) -> None:
    config = compose(["debug=tiny", *overrides])
    assert inputs.conditioner is not None
    conditioner = Conditioner(config.conditioning, inputs.conditioner.encoder)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_config_fits(config, inputs.loader, inputs.autoencoder, conditioner)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["data.buckets={6x64x64:5}"],
            r"data\.buckets\.6x64x64 5 does not divide the 12 clips .*; choose 4 or 6",
        ),
        (
            ["data.buckets={6x64x64:1,2x64x64:1}", "conditioning=interpolation", "model=svd_interpolation"],
            r"data\.buckets\.2x64x64 is 2: with the first and the last frame .* must be at least 3",
        ),
        (
            ["data.buckets={6x64x64:1,6x64x40:1}"],
            r"data\.buckets\.6x64x40 has a width of 40: this network takes multiples of 16 pixels",
        ),
        (
            ["data.buckets={6x64x64:1,6x32x32:1}", "noise=simple_shifted"],
            r"noise\.kind is shifted_cosine, which depends on the size of the clips, and data\.buckets has 2",
        ),
        (["data.buckets={6x64x64:1,9x64x64:1}"], r"none of the \d+ samples in .* fits bucket 9x64x64"),
    ],
)
def test_buckets_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    writer = ShardWriter(tmp_path / "data")
    for number, (frames, height, width) in enumerate([(6, 64, 64), (2, 64, 64), (6, 64, 40), (6, 32, 32)]):
        pixels = moving_square(frames, height, width)
        writer.add(f"s{number}", "mp4", encode(pixels), sample_metadata(pixels))
    writer.close()
    data = [f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=sentence):
        read_inputs(compose(["debug=tiny", *data, *overrides]), CPU, None)
