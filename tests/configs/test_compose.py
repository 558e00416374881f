"""Every file under conf/ composes to a RunConfig and builds its network; misspelt keys are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException

from svd_ds.command_line import CONF
from svd_ds.compose import COMPOSE_ERRORS, compose, debug_last, explain
from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise_schedule
from svd_ds.model.unet import UNet
from svd_ds.scalars import SCALARS

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "debug", "sweep")
)
# Settings that every user must give: data, frozen models, run of the previous stage.
REQUIRED = ["data.path=data/quickstart", "frozen.path=tiny", "init.from=runs/before"]


def build(config: RunConfig) -> UNet:
    build_noise_schedule(config.noise, config.data.height, config.data.width)
    with torch.device("meta"):
        return UNet(config.model)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda part: part)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    unet = build(compose([f"{group}={choice}", *REQUIRED]))
    assert all(parameter.is_meta for parameter in unet.parameters())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("debug", [[], ["debug=tiny"]], ids=["full", "tiny"])
def test_every_experiment_composes_and_builds(experiment: str, debug: list[str]) -> None:
    # A decoder starts from the frozen models, and has no previous stage.
    required = REQUIRED[:2] if experiment == "temporal_decoder" else REQUIRED
    config = compose([f"+experiment={experiment}", *debug, *required])
    unet = build(config)
    channels = {"none": 4, "image": 8, "ends": 9}[config.conditioning.concat]
    assert unet.config.in_channels == channels
    assert unet.config.masked == (config.conditioning.concat == "ends")
    assert unet.config.num_scalars == len(config.conditioning.scalars)


@pytest.mark.parametrize(
    ("model", "conditioning"),
    [
        ("svd", "image_to_video"),
        ("svd_t2v", "text_to_video"),
        ("svd_interpolation", "interpolation"),
        ("svd", "multiview"),
    ],
)
def test_models_fit_their_conditioning(model: str, conditioning: str) -> None:
    config = compose([f"model={model}", f"conditioning={conditioning}"])
    assert config.model.num_scalars == len(config.conditioning.scalars)
    assert list(config.conditioning.scalars) == sorted(config.conditioning.scalars, key=list(SCALARS).index)
    assert config.model.masked == (config.conditioning.concat == "ends")


def test_every_group_has_a_test() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"sweep"}
    assert groups == {group for group, _ in CHOICES} | {"experiment", "debug"}


def test_debug_overrides_experiments_and_the_command_line_overrides_debug() -> None:
    config = compose(["debug=tiny", "+experiment=stage2"])
    assert config.batch.size == 12
    assert config.model.widths == (32, 64)
    assert config.model.in_channels == 4, "the number of input channels is the experiment's"
    assert compose(["debug=tiny", "+experiment=stage2", "run.steps=3"]).run.steps == 3


def test_members_of_an_ablation_have_separate_run_folders() -> None:
    one, two = (compose(["+experiment=noise_schedule", f"noise={noise}"]) for noise in ("edm", "svd_base"))
    assert one.run.dir == "runs/noise_schedule-edm"
    assert two.run.dir == "runs/noise_schedule-svd_base"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.learning_rate=1", "there is no key optim.learning_rate: use optim.lr"),
        ("+optim.warmup=1", "there is no key optim.warmup: do you mean optim.warmup_samples?"),
        ("lr=1", "there is no key lr: do you mean optim.lr?"),
        ("optim.lr.peak=1", "there is no key optim.lr.peak: optim.lr is a number, write optim.lr=VALUE"),
        ("optimizer.lr=1", "there is no key optimizer.lr: do you mean optim.lr?"),
        ("model.widths=[32", "model.widths is [32: it cannot be read as a list of whole numbers"),
        ("optim.lr=1=2", "optim.lr is 1=2: it cannot be read as a number"),
        ("+experiment=stage9", "stage9"),
        ("noise=brown", "brown"),
        ("noise=edm,svd_base", "python -m svd_ds.train -m"),
        ("run.steps=many", "many"),
        ("optim.schedule=linear", "linear"),
        ("init.source=runs/stage1", "there is no key init.source: do you mean init.from?"),
        ("+init.source=runs/stage1", "there is no key init.source: do you mean init.from?"),
        ("init=runs/stage1", "init is 'runs/stage1': it must have the keys from, which"),
    ],
)
def test_invalid_overrides_are_refused_by_name(override: str, named: str) -> None:
    with pytest.raises((HydraException, ValueError)) as caught:
        compose([override])
    assert named in explain(caught.value)
    assert "\n" not in explain(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("task=vae", "task is 'vae': it must be one of unet, decoder"),
        ("init.from=runs/stage1", "a decoder starts from the vae/ in frozen.path"),
        ("data.latents=true data.crop=center", "a decoder is trained on frames"),
        ("optim.spatial_lr_scale=0 optim.temporal_lr_scale=0", "a decoder has no other layers"),
        ("loss.adversarial_start=-1", "loss.adversarial_start is -1"),
    ],
)
def test_decoder_settings_are_checked(override: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        compose(["+experiment=temporal_decoder", *REQUIRED[:2], *override.split()])


def test_init_from_is_the_only_key_of_the_previous_stage() -> None:
    config = compose(["init.from=runs/stage1", "init.which=raw"])
    assert (config.init.source, config.init.which) == ("runs/stage1", "raw")
    assert config.as_dict()["init"] == {"from": "runs/stage1", "which": "raw"}, "with the key of config files"


def test_debug_is_moved_to_the_end() -> None:
    assert debug_last(["debug=tiny", "+experiment=a", "x=1"]) == ["+experiment=a", "x=1", "+debug=tiny"]
    assert debug_last(["debug=tiny", "x=1", "+debug=tiny"]) == ["x=1", "+debug=tiny"]


def test_batch_size_is_exact_or_refused() -> None:
    batch = compose(["batch.size=12", "batch.micro=2"]).batch
    assert [batch.split(ranks).num_micro_batches(0) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"batch.size 12 cannot be split over 5 ranks; start 4 or 6"):
        batch.split(5)
    with pytest.raises(ValueError, match=r"batch.micro 2 does not divide the 3 clips .* choose 1 or 3"):
        batch.split(4)


def test_config_as_dict_is_plain(tmp_path: Path) -> None:
    import yaml

    settings = compose().as_dict()
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings
    assert settings["model"]["widths"] == list(compose().model.widths)


def test_buckets_and_mixtures_are_given_on_the_command_line() -> None:
    config = compose(["data.buckets={6x128x160:2,1x128x160:8}", "data.mixture={data/a:3,data/b:1}"])
    assert [str(shape) for shape in config.data.shapes] == ["6x128x160", "1x128x160"]
    assert config.data.sets == {"data/a": 3.0, "data/b": 1.0}
    with pytest.raises(ValueError, match=r"data\.buckets has 6x64x64, but not the shape .*, 6x128x160"):
        compose(["data.buckets={6x64x64:2}"])
    with pytest.raises(ValueError, match="'6x64', which is not FRAMESxHEIGHTxWIDTH"):
        compose(["data.buckets={6x64:2}"])


def test_micro_batch_is_a_number_or_auto() -> None:
    assert compose(["batch.micro=auto"]).batch.micro == "auto"
    assert compose(["batch.micro=auto"]).as_dict()["batch"] == {"size": 8, "micro": "auto"}
    for value in ("most", "2.5", "true"):
        with pytest.raises((ValueError, *COMPOSE_ERRORS)) as refused:
            compose([f"batch.micro={value}"])
        sentence = explain(refused.value) if isinstance(refused.value, COMPOSE_ERRORS) else str(refused.value)
        assert sentence.endswith("it must be a whole number or auto"), value


def test_placeholder_replaces_only_required_values_that_are_missing() -> None:
    config = compose(["+experiment=stage2", "frozen.path=mine"], placeholder="later")
    assert (config.data.path, config.init.source, config.frozen.path) == ("later", "later", "mine")
    assert config.optim == compose(["+experiment=stage2", *REQUIRED]).optim
