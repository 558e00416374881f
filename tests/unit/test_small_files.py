"""Small files of strangers cannot make a reader wait, grow without bounds, or build objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds import small_files
from svd_ds.evaluation.runs import read_run
from svd_ds.json_lines import read_json_lines
from svd_ds.pixels.container import open_container
from svd_ds.pixels.still import read_still
from svd_ds.small_files import MAX_JSON, read_json, read_regular, read_yaml
from svd_ds.tensor_files import open_tensors


def opened(path: Path) -> None:
    with open_container(path):
        pass


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize(
    "read", [read_regular, read_json, read_yaml, read_json_lines, open_tensors, read_still, opened]
)
def test_pipes_and_devices_are_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(ValueError, match=rf"{path} is not a regular file, but a pipe or a device"):
        read(path)


def test_link_to_a_file_is_read(tmp_path: Path) -> None:
    """The cache of a hub client, and data sets on several disks, consist of links."""
    (tmp_path / "there.json").write_text("[1]")
    (tmp_path / "here.json").symlink_to(tmp_path / "there.json")
    assert read_json(tmp_path / "here.json") == [1]


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.json"
    path.touch()
    os.truncate(path, MAX_JSON + 1)
    with pytest.raises(
        ValueError, match=rf"huge\.json has {MAX_JSON + 1} bytes: it must have at most {MAX_JSON}"
    ):
        read_json(path)
    monkeypatch.setattr(small_files, "MAX_YAML", 10)
    (tmp_path / "a.yaml").write_text("a: 1234567890")
    with pytest.raises(ValueError, match=r"a\.yaml has 13 bytes: it must have at most 10"):
        read_yaml(tmp_path / "a.yaml")


def laughs(step: str) -> str:
    """Thirty lines that expand to 2**30 values."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} " + step.replace("*", f"*a{n - 1}") for n in range(1, 31)]
    return "\n".join(lines) + "\n"


YAML_BOMBS = {
    "lists": laughs("[*, *]"),
    "objects": laughs("{x: *, y: *}"),
    "merge keys": laughs("{<<: [*, *]}"),
    "itself": "a: &a {b: *a}\n",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_aliases_in_a_config_are_refused(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text(YAML_BOMBS[bomb])
    with pytest.raises(ValueError, match=r"config\.yaml is damaged: .* refers to an anchor"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("[" * 5_000, "recursion"),
        ("a: [1", "expected"),
    ],
)
def test_other_yaml_is_refused_by_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml is damaged: it is not YAML \(.*{words}"):
        read_yaml(tmp_path / "config.yaml")


def test_references_in_a_config_stay_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: ${oc.env:HOME}\n_target_: os.mkdir\n")
    (tmp_path / "metrics.jsonl").touch()
    assert read_run(tmp_path).settings == {"a": "${oc.env:HOME}", "_target_": "os.mkdir"}
