"""Every setting has a rule, and no value of a setting ends in anything but a config or one sentence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from svd_ds.compose import (
    COMPOSE_ERRORS,
    _compose_node,
    explain,
    parse_command_line,
    settings_by_key,
    to_config,
)
from svd_ds.config import RunConfig
from svd_ds.data.config import DataConfig
from svd_ds.diffusion.noise import NoiseConfig, build_noise_schedule, karras_sigmas
from svd_ds.model.unet import UNetConfig
from svd_ds.sample import SampleConfig
from svd_ds.settings import (
    Choice,
    Range,
    Setting,
    Settings,
    Text,
    all_settings,
    choice,
    number,
    text,
)
from svd_ds.training.optim import OptimConfig

SETTINGS = list(all_settings(RunConfig))
NUMBERS = [setting for setting in SETTINGS if setting.kind in (int, float)]
TEXTS = [setting for setting in SETTINGS if setting.kind is str]
HOSTILE = (math.nan, math.inf, -math.inf, -1, 0, 1e-300, 1e308, -1e308, 2**31, 2**63, 2**70, -(2**70))


@pytest.fixture(scope="module")
def tree() -> DictConfig:
    node = _compose_node(parse_command_line(["data.path=data/quickstart"]))
    OmegaConf.set_struct(node, False)
    del node["hydra"]
    return node


def composed(tree: DictConfig, setting: Setting, value: Any) -> RunConfig | str:
    """The config with `value` in one setting, or the sentence that refuses it."""
    node = tree.copy()
    if setting.is_list:
        value = [value]
    if setting.is_dict:
        value = {"6x128x160" if setting.name == "buckets" else "fps": value}
    try:
        OmegaConf.update(node, setting.key, value, merge=False)
        return to_config(node)
    except (*COMPOSE_ERRORS, ValueError) as error:
        return explain(error) if isinstance(error, COMPOSE_ERRORS) else str(error)


def test_every_setting_has_a_rule() -> None:
    rules = {int: Range, float: Range, str: Choice | Text, bool: type(None)}
    for setting in SETTINGS:
        assert isinstance(setting.rule, rules[setting.kind]), setting.key
        if isinstance(rule := setting.rule, Range):
            assert rule.ge is not None or rule.gt is not None, f"{setting.key} has no lower bound"


def test_keys_equal_the_keys_of_the_config_file() -> None:
    settings = RunConfig().as_dict()
    keys = {key for name, part in settings.items() for key in _keys(name, part)}
    assert {setting.key for setting in SETTINGS} == keys


def _keys(name: str, part: Any) -> list[str]:
    return [f"{name}.{key}" for key in part] if isinstance(part, dict) else [name]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.key)
def test_any_number_gives_a_config_or_one_sentence(tree: DictConfig, setting: Setting) -> None:
    for value in HOSTILE:
        outcome = composed(tree, setting, value)
        if isinstance(outcome, str):
            # Hydra adds the key of a dict's element of another type: "Error merging override KEY=...".
            is_named = setting.key in outcome or (setting.is_dict and "could not be converted" in outcome)
            assert "\n" not in outcome and is_named, (value, outcome)
        else:
            assert math.isfinite(value), f"{setting.key} took {value}"
            assert -3.5e38 < value < 3.5e38, f"{setting.key} took {value}"


@pytest.mark.parametrize("setting", TEXTS, ids=lambda setting: setting.key)
def test_empty_text_is_refused(tree: DictConfig, setting: Setting) -> None:
    for value in ("", " ", "a\0b", "a\nb"):
        outcome = composed(tree, setting, value)
        assert isinstance(outcome, str) and outcome.startswith(setting.key), (value, outcome)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optim.lr", -1e-3, "optim.lr is -0.001: it must be above 0 and at most 100"),
        ("optim.lr", 0.0, "optim.lr is 0.0: it must be above 0 .*optim.schedule=zero"),
        ("optim.lr", math.nan, "optim.lr is nan: it must be finite, above 0"),
        ("optim.temporal_lr_scale", -1, "optim.temporal_lr_scale is -1.0: it must be at least 0"),
        ("optim.beta2", 1, "optim.beta2 is 1.0: it must be at least 0 and below 1"),
        ("guard.loss_factor", 0.5, "guard.loss_factor is 0.5: it must be above 1, or 0 to switch it off"),
        ("model.head_width", 0, "model.head_width is 0: it must be at least 1"),
        ("model.widths", [64, 0], r"model.widths\[1\] is 0: it must be at least 1"),
        (
            "batch.size",
            2**70,
            r"batch.size is 1180\d+: it must be at least 1 and at most 1048576",
        ),
        ("data.num_workers", 257, "data.num_workers is 257: it must be at least 0 and at most 256"),
        ("data.read_timeout_seconds", math.inf, "data.read_timeout_seconds is inf: it must be finite"),
        ("data.mixture", {"a": 1, "b": -2}, "data.mixture.b is -2.0: it must be at least 0"),
        ("data.caption_weights", {"coca": math.nan}, "data.caption_weights.coca is nan: it must be finite"),
        ("data.buckets", {"6x128x160": 0}, "data.buckets.6x128x160 is 0: it must be at least 1"),
        (
            "watchdog.first_minutes",
            1,
            "first_minutes is 1.0: it must be at least watchdog.minutes, 30",
        ),
        ("sampling.rho", 0, "sampling.rho is 0.0: it must be at least 1"),
        ("sampling.sampler", "ddim", "sampling.sampler is 'ddim': it must be one of euler, heun"),
        ("ema.lengths", [0.05, 0.05], "two of the averages have the name power-0.050"),
        ("run.dir", "", "run.dir is '': it must be a path, and not empty"),
        ("init.from", "", "init.from is '': it must be a path, and not empty"),
        ("name", "", "name is '': it must be a text, and not empty"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every is -1: it must be at least 0"),
    ],
)
def test_error_names_key_value_and_range(tree: DictConfig, key: str, value: Any, sentence: str) -> None:
    node = tree.copy()
    OmegaConf.update(node, key, value, merge=False)
    with pytest.raises(ValueError, match=sentence):
        to_config(node)


def test_dataclasses_built_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"optim.lr is nan"):
        OptimConfig(lr=math.nan)
    with pytest.raises(ValueError, match=r"sampling.seed is -1: it must be at least 0"):
        SampleConfig(seed=-1)
    with pytest.raises(ValueError, match=re.escape("model.widths[0] is '64': it must be a whole number")):
        UNetConfig(widths=["64"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.num_layers is True: it must be a whole number"):
        UNetConfig(num_layers=True)
    with pytest.raises(ValueError, match=r"model.head_width is null: it must be a whole number"):
        UNetConfig(head_width=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data.where is 'motion>1': it must be a list"):
        DataConfig(where="motion>1")  # type: ignore[arg-type]


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    paths = [setting for setting in TEXTS if isinstance(setting.rule, Text) and setting.rule.is_path]
    assert {
        "run.dir",
        "run.resume",
        "data.path",
        "data.cache",
        "frozen.path",
        "init.from",
        "evaluation.path",
    } < {setting.key for setting in paths}
    data = DataConfig(path="~/shards", cache="~/cache", mixture={"~/a": 1, "pipe:cat ~/{}": 2})
    assert (data.path, data.cache) == ("/home/someone/shards", "/home/someone/cache")
    assert list(data.mixture) == ["/home/someone/a", "pipe:cat ~/{}"]


def test_accepted_extremes_can_be_computed_with() -> None:
    import torch

    ends = torch.tensor([2.0**-32, 0.5, 1 - 2.0**-32], dtype=torch.float64)
    for mean in (-20, 20):
        sigma = build_noise_schedule(NoiseConfig(P_mean=mean, P_std=3.5), 8, 8).quantile(ends)
        assert torch.isfinite((sigma**2).float()).all() and (sigma.float() > 0).all()
    for rho in (1, 100):
        assert torch.isfinite(karras_sigmas(10, 1e-6, 1e6, rho)).all()


def test_rule_applies_in_a_subclass_and_to_each_element() -> None:
    @dataclass(frozen=True)
    class Part(Settings, section="part"):
        numbers: tuple[float, ...] = number((), gt=0)
        by_name: dict[str, int] = number(dict, ge=1)
        word: str = choice("a", ("a", "b"))
        name: str | None = text(None)

    @dataclass(frozen=True)
    class Wider(Part):
        more: int = number(1, ge=1)

    assert Wider(numbers=[1, 2]).numbers == (1, 2)  # type: ignore[arg-type]
    for values, message in (
        ({"numbers": (1, 0)}, r"part.numbers\[1\] is 0: it must be above 0"),
        ({"by_name": {"x": 0}}, "part.by_name.x is 0: it must be at least 1"),
        ({"word": "c"}, "part.word is 'c': it must be one of a, b"),
        ({"more": 0}, "part.more is 0: it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Wider(**values)  # type: ignore[arg-type]


def test_settings_are_found_by_their_key() -> None:
    assert settings_by_key()["init.from"].name == "source"
