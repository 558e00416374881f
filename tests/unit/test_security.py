"""What files from strangers cannot do (docs/security.md). Each test plants an attack that leaves a mark."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svd_ds.compose import compose
from svd_ds.curate import craft, embed
from svd_ds.door import print_error
from svd_ds.evaluation.report import write_report
from svd_ds.fsync_io import read_json, read_yaml
from svd_ds.model.weights import load_unet
from svd_ds.training.folder import RunFolder


class Exploit:
    """Unpickling it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def test_exploit_works_where_a_pickle_is_loaded_without_care(mark: Path) -> None:
    """The other tests are worth nothing if it does not."""
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["unet.ckpt", "unet.safetensors", "unet.bin", "unet.pt"])
def test_pickled_weights_are_refused_and_not_run(tmp_path: Path, mark: Path, name: str) -> None:
    torch.save({"state_dict": Exploit(mark)}, tmp_path / name)
    with pytest.raises((ValueError, OSError), match=re.escape(name)):
        load_unet(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("load", [craft.load, embed.read_head])
@pytest.mark.parametrize("name", ["detector.pth", "detector.safetensors"])
def test_detector_weights_with_code_in_them_are_refused_and_not_run(
    tmp_path: Path, mark: Path, load: Callable[[Path], object], name: str
) -> None:
    path = tmp_path / name
    torch.save({"weight": Exploit(mark)}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is no file of tensors")):
        load(path)
    assert not mark.exists()


def test_yaml_builds_no_objects(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_yaml(path)
    RunFolder(tmp_path).check_belongs({"a": 1})
    assert not mark.exists()


def test_nested_json_does_not_overflow_the_stack(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json"):
        read_json(tmp_path / "deep.json")


def test_hydra_instantiates_nothing(mark: Path) -> None:
    with pytest.raises(ValueError, match="_target_"):
        compose(["+optim._target_=os.mkdir", f"+optim.path={mark}"])
    assert not mark.exists()


def test_markup_in_names_and_values_is_text_in_a_report(tmp_path: Path) -> None:
    run = tmp_path / "<script>alert(1)"
    run.mkdir()
    attack = "</style><script>alert(2)</script><img src=x onerror=alert(3)>"
    (run / "config.yaml").write_text(yaml.safe_dump({"name": attack, attack: attack}))
    rows = [
        {"step": s, "samples": s, "loss": 1.0, "lr": 1e-3, "clips_per_s": 1.0, "step_s": 1.0} for s in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | {attack: 1.0}) + "\n" for row in rows))
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "alert(2)" in html, "the setting is shown"
    assert not re.search(r"<script>alert|<img src=x|</style><script", html)


@pytest.mark.parametrize("name", ["report.html.jinja", "data_card.html.jinja"])
def test_reports_load_nothing_from_the_network(name: str) -> None:
    template = (files("svd_ds") / "assets" / name).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(\s*["']?https?:""", template)


def test_control_sequences_of_a_name_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("\x1b]0;owned\x07\x1b[2Jfile \x9b31m\x00name \u202e.mp4 视频")
    printed = capsys.readouterr().err
    assert "file" in printed and "name" in printed and "视频" in printed
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)


def test_only_known_places_unpickle_start_a_shell_or_trust_remote_code() -> None:
    """A new one needs a line in docs/security.md, and here."""
    package = Path(sys.modules["svd_ds"].__file__ or "").parent
    pattern = re.compile(
        r"pickle\.load|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_|full_)?load\(|shell=True|os\.system"
        r"|trust_remote_code|allow_pickle=True|\beval\((?!\))|\bexec\(|extractall"
    )
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted([*package.rglob("*.py"), *(package.parent / "tools").rglob("*.py")])
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert found == []
