"""Untrusted files (docs/security.md): each test plants an attack that would leave a mark."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import sys
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from svd_ds.cli import print_error, print_line
from svd_ds.compose import compose
from svd_ds.curate import craft, embed
from svd_ds.curate.media import encode_still
from svd_ds.curate.select import ClipRecord
from svd_ds.data.external_shards import ProbedSample, probe_shard
from svd_ds.data.quarantine import Fault
from svd_ds.evaluation.data_card import write_data_card
from svd_ds.evaluation.report import write_report
from svd_ds.run_folder import RunFolder
from svd_ds.small_files import read_json, read_yaml
from svd_ds.training.metrics import LoggerConfig, Metrics
from svd_ds.weights.io import load_unet
from tests.unit.data.test_reader import picture

PICTURE = picture(0, 16)


class Exploit:
    """Unpickling it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def test_exploit_runs_if_a_pickle_is_loaded(mark: Path) -> None:
    """The other tests are worth nothing if it does not."""
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["unet.ckpt", "unet.safetensors", "unet.bin", "unet.pt"])
def test_pickled_weights_are_refused_and_not_run(tmp_path: Path, mark: Path, name: str) -> None:
    torch.save({"state_dict": Exploit(mark)}, tmp_path / name)
    with pytest.raises((ValueError, OSError), match=re.escape(name)):
        load_unet(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("load", [craft.load_craft, embed.read_aesthetic_head])
@pytest.mark.parametrize("name", ["detector.pth", "detector.safetensors"])
def test_detector_weights_with_code_in_them_are_refused_and_not_run(
    tmp_path: Path, mark: Path, load: Callable[[Path], object], name: str
) -> None:
    path = tmp_path / name
    torch.save({"weight": Exploit(mark)}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a file of tensors")):
        load(path)
    assert not mark.exists()


def test_yaml_builds_no_objects(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_yaml(path)
    RunFolder(tmp_path).check_config_matches({"a": 1})
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
    assert Code(html).found == []


class Code(HTMLParser):
    """Collect the code of a page: its script elements and its event attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "iframe", "object", "embed") else []
        self.found += [name for name, value in attrs if name.startswith("on") or "script:" in str(value)]


ATTACK = (
    """--></title></table><script>alert(1)</script><img src=x onerror=alert(2)>" onload="alert(3) $\\foo{$"""
)


def test_markup_of_strangers_is_text_in_a_data_card(tmp_path: Path) -> None:
    (tmp_path / "clip.jpg").write_bytes(encode_still(np.zeros((32, 32, 3), np.uint8)))
    clips = [
        ClipRecord(
            id=ATTACK, video=ATTACK, start_frame=0, end_frame=1, fps=24, height=32, width=32,
            method="encoded", media="clip.jpg", motion=0.5, annotations={ATTACK: number},
            captions={ATTACK: ATTACK}, reason=reason,
        )
        for number, reason in ((1.0, None), (2.0, f"{ATTACK}: {ATTACK}"), (3.0, None))
    ]  # fmt: skip
    write_data_card(clips, [(ATTACK, ATTACK)], 1, [ATTACK], tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("alert(1)") > 5, "it is shown"
    assert Code(html).found == []
    assert Code(f"<p>{ATTACK}</p><a href='javascript:1'>").found == ["script", "onerror", "href"]


@pytest.mark.parametrize("name", ["contact_sheet.png", "video-0.mp4", "measures.json"])
@pytest.mark.timeout(30)
def test_link_in_a_run_adds_no_other_file_to_its_report(tmp_path: Path, name: str) -> None:
    run, secret = tmp_path / "run", tmp_path / "id_rsa"
    folder = run / "samples" / "step-0000001"
    folder.mkdir(parents=True)
    secret.write_text("PRIVATE KEY")
    (run / "config.yaml").write_text("a: 1\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    for target in (secret, Path("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        if name == "measures.json" and target != secret:
            continue  # no file: there are no measures
        with pytest.raises(ValueError, match=re.escape(name)):
            write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html.jinja", "data_card.html.jinja"])
def test_reports_load_nothing_from_the_network(name: str) -> None:
    template = (files("svd_ds") / "assets" / name).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(\s*["']?https?:""", template)


def test_control_sequences_of_a_name_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("\x1b]0;owned\x07\x1b[2Jfile \x9b31m\x00name \u202e.mp4 视频")
    printed = capsys.readouterr().err
    assert "file" in printed and "name" in printed and "视频" in printed
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)


def test_control_sequences_of_warnings_and_logs_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    attack = "\x1b]0;owned\x07\x1b[2Jfile \x9b31m\u202e.mp4"
    print_line(f"warning: {attack}")
    folder = RunFolder(tmp_path)
    folder.open({}, 0)
    with Metrics(folder, LoggerConfig(wandb="disabled"), {}, 1, 0) as metrics:
        metrics.print_line(attack)
    shown = capsys.readouterr().out + (folder.logs / "train.log").read_text()
    assert shown.count("owned") == 3 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)


TARS = {
    "symlink": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "other.mp4"),
    "device": (tarfile.CHRTYPE, ""),
    "pipe": (tarfile.FIFOTYPE, ""),
    "folder": (tarfile.DIRTYPE, ""),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", TARS)
def test_members_that_are_no_files_are_neither_read_nor_created(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tar", "w") as tar:
        names = ["a.mp4", "../b.mp4", f"{tmp_path}/c.mp4"]
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = TARS[kind]
            tar.addfile(entry)
    found = list(probe_shard(Path("a.tar"), "a.tar", None))
    assert all(isinstance(each, Fault) for each in found)
    assert [fault.id for fault in found] == ([] if kind == "folder" else names), "a folder is no sample"
    assert os.listdir() == ["a.tar"] and not (tmp_path.parent / "b.mp4").exists()


def test_member_names_cannot_write_outside_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../b.png", f"{tmp_path}/c.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PICTURE)
            tar.addfile(entry, io.BytesIO(PICTURE))
    found = list(probe_shard(tmp_path / "a.tar", "a.tar", None))
    assert [type(each) for each in found] == [ProbedSample, ProbedSample], (
        "their pixels are read where they are"
    )
    assert os.listdir(tmp_path) == ["a.tar"] and not (tmp_path.parent / "b.png").exists()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tar_is_not_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """A gibibyte of zeros has a mebibyte in it."""
    (tmp_path / "a.tar").write_bytes(pack(bytes(2**24)))
    (found,) = probe_shard(tmp_path / "a.tar", "a.tar", None)
    assert isinstance(found, Fault) and "the tar cannot be read" in found.cause


def test_no_code_unpickles_starts_a_shell_or_trusts_remote_code() -> None:
    """An exception needs a reason in docs/security.md, and a line here."""
    package = Path(sys.modules["svd_ds"].__file__ or "").parent
    pattern = re.compile(
        r"pickle\.load|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_|full_)?load\(|shell=True|os\.system"
        r"|trust_remote_code|allow_pickle=True|\beval\((?!\))|\bexec\(|extractall"
    )
    for call in (
        "pickle.load(f)",
        "torch.load(f)",
        "yaml.load(f)",
        "run(c, shell=True)",
        "eval(a)",
        "exec(a)",
    ):
        assert pattern.search(call)
    assert not pattern.search("torch.load(f, weights_only=True)")
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted([*package.rglob("*.py"), *(package.parent / "tools").rglob("*.py")])
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert found == []
