"""`--help KEY`, and docs/configuration.md, which is written from the settings dataclasses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svd_ds.compose import settings_by_key
from svd_ds.config_reference import groups, help_text, markdown, sections
from svd_ds.train import help_names

ROOT = Path(__file__).parents[2]


def test_configuration_page_equals_the_dataclasses() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == markdown(), "run `make docs`, which writes docs/configuration.md anew"


def test_every_setting_and_choice_is_in_the_reference() -> None:
    keys = [entry.setting.key for section in sections().values() for entry in section.entries]
    assert sorted(keys) == sorted(settings_by_key())
    choices = sum(len(names) for names in groups().values())
    assert len(markdown().splitlines()) > len(keys) + choices


def test_help_shows_key_type_range_default_and_text() -> None:
    shown = help_text("batch.size")
    assert shown.startswith("batch.size\n  whole number; at least 1 and at most 1048576; default: 8\n")
    assert "optimiser step" in shown


def test_help_of_a_section_shows_all_its_keys() -> None:
    shown = help_text("batch")
    assert "batch.size\n" in shown and "batch.micro\n" in shown


def test_help_of_a_group_shows_its_choices() -> None:
    assert "noise=NAME chooses" in help_text("noise") and "sd21_discrete" in help_text("noise")
    assert "+experiment=NAME chooses" in help_text("+experiment")


@pytest.mark.parametrize(
    ("name", "nearest"), [("batch.sise", "batch.size"), ("lr", "optim.lr"), ("nois", "noise")]
)
def test_help_of_an_unknown_name_has_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"there is no key or group {name}; the nearest are .*{nearest}"):
        help_text(name)


def test_help_without_a_name_is_that_of_hydra() -> None:
    assert help_names(["--help"]) == []
    assert help_names(["model=svd", "--help"]) == []
    assert help_names(["batch.size"]) == []
    assert help_names(["--help", "batch.size", "noise"]) == ["batch.size", "noise"]


@pytest.mark.parametrize(("words", "code"), [(["--help", "optim.lr"], 0), (["--help", "optim.lrr"], 2)])
def test_training_command_explains_a_key(words: list[str], code: int) -> None:
    ended = subprocess.run([sys.executable, "-m", "svd_ds.train", *words], capture_output=True, text=True)
    assert ended.returncode == code
    assert "optim.lr" in (ended.stderr if code else ended.stdout)


def test_plain_help_mentions_help_key() -> None:
    ended = subprocess.run([sys.executable, "-m", "svd_ds.train", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--help KEY explains a setting" in ended.stdout
    assert "temporal: make_a_video, none, svd, videoldm" in ended.stdout
