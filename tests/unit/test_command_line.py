"""Config sources of a command line: conf/, --config-dir, hydra.searchpath, --config-path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from svd_ds.command_line import CommandLine
from svd_ds.compose import COMPOSE_ERRORS, compose, explain, keys_for_folder, parse_command_line

MEMBER = "# @package _global_\nname: member-{name}\nrun: {{steps: {steps}}}\n"
WAYS: dict[str, Callable[[Path], list[str]]] = {
    "--config-dir DIR": lambda folder: ["--config-dir", str(folder)],
    "--config-dir=DIR": lambda folder: [f"--config-dir={folder}"],
    "-cd DIR": lambda folder: ["-cd", str(folder)],
    "hydra.searchpath": lambda folder: [f"hydra.searchpath=[file://{folder}]"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Config folder with a group `subset` of two configs, and a member of the group `experiment`."""
    path = tmp_path / "my configs"
    for group, name, steps in (("subset", "few", 3), ("subset", "many", 7), ("experiment", "mine", 5)):
        (path / group).mkdir(parents=True, exist_ok=True)
        (path / group / f"{name}.yaml").write_text(MEMBER.format(name=name, steps=steps))
    return path


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_a_users_folder_are_groups(folder: Path, way: str) -> None:
    if way == "hydra.searchpath":
        folder = folder.rename(folder.with_name("configs"))
    words = WAYS[way](folder)
    for ordered in ([*words, "+subset=few"], ["run.seed=1", *words, "+subset=few"]):
        config = compose(ordered)
        assert (config.name, config.run.steps, config.run.dir) == ("member-few", 3, "runs/member-few")
    assert compose([*words, "+experiment=mine"]).run.steps == 5, "of a group that conf/ has as well"
    with pytest.raises(ValueError, match="there is no key subsets"):
        compose([*words, "+subsets=few"])
    with pytest.raises(COMPOSE_ERRORS) as caught:
        compose([*words, "+subset=none"])
    assert "few, many" in explain(caught.value)


def test_group_that_no_folder_has_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no key subset; there are batch"):
        compose(["+subset=few"])
    with pytest.raises(COMPOSE_ERRORS) as caught:
        compose(["--config-dir", f"{folder}/nowhere", "+subset=few"])
    assert explain(caught.value) == f"--config-dir is {folder}/nowhere, and there is no such folder"


def test_runs_of_a_users_group_get_folders_of_their_own(folder: Path) -> None:
    line = parse_command_line(["-m", "--config-dir", str(folder), "+subset=glob(*)", "run.seed=1,2"])
    assert line.multirun
    assert keys_for_folder(line) == ["run.seed"], "the members of the group differ in name"


def test_options_are_accepted_at_any_position() -> None:
    line = CommandLine.parse(["a=1", "--config-dir", "x y", "b=2", "-m", "+c=3", "--local-rank=0"])
    assert line.words() == ["--multirun", "--config-dir=x y", "--local-rank=0", "a=1", "b=2", "+c=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "run.seed=1,2"], "-m starts several runs"),
        (["--cfg", "job"], "--cfg starts no run"),
        (["--info"], "--info starts no run"),
        (["--help"], "--help starts no run"),
    ],
)
def test_job_starts_exactly_one_run(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(words)


def test_config_of_a_run_starts_another_run(tmp_path: Path) -> None:
    first = compose(["run.seed=5", "debug=tiny"])
    settings = first.as_dict() | {"code": {"commit": "1a2b"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    again = compose(["--config-path", str(tmp_path), "--config-name", "config", "run.steps=9"])
    assert (again.run.seed, again.run.steps, again.model) == (5, 9, first.model)


def test_hydra_composes_the_same_config(folder: Path) -> None:
    """`--config-dir` after an override, through the real entry point."""
    command = [sys.executable, "-m", "svd_ds.train", "run.seed=4", "--config-dir", str(folder), "+subset=few"]
    ended = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    printed = yaml.safe_load(ended.stdout)
    assert (printed["name"], printed["run"]["steps"], printed["run"]["seed"]) == ("member-few", 3, 4)
