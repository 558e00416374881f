"""Raw files: found, named, and what the files beside them tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.curate.raw import find_raw, name_files, told_of


def test_captions(tmp_path: Path) -> None:
    video = tmp_path / "A_red-car (1).mp4"
    assert told_of(video) == {"captions": {"name": "A red car 1"}}
    video.with_suffix(".txt").write_text("a red car\n turns left\n")
    assert told_of(video) == {"captions": {"text": "a red car turns left"}}
    table = video.with_suffix(".json")
    table.write_text(json.dumps({"caption": "one"}))
    assert told_of(video) == {"captions": {"text": "one"}}
    table.write_text(json.dumps({"captions": {"coca": "two", "llm": "three"}}))
    assert told_of(video) == {"captions": {"coca": "two", "llm": "three"}}
    table.write_text(json.dumps({"elevation": 10, "annotations": {"text_area": 0.05}}))
    assert told_of(video) == {
        "captions": {"text": "a red car turns left"},
        "elevation": 10.0,
        "annotations": {"text_area": 0.05},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        "[]",
        "{}",
        "not json",
        '{"text": "a red car"}',
        '{"captions": {"coca": 3}}',
        '{"captions": "a red car"}',
        '{"elevation": "high"}',
        '{"elevation": 120}',
        '{"annotations": {"aesthetic": "good"}}',
    ],
)
def test_a_sidecar_of_another_kind_is_refused(tmp_path: Path, wrong: str) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text(wrong)
    with pytest.raises(ValueError):
        told_of(video)


def test_keys_are_free() -> None:
    names = ["a b/c.mp4", "a b/c.mov", "a_b/c.mp4", "d.e.mp4"]
    assert [file.key for file in name_files(names, [Path()] * 4)] == ["a_b_c", "a_b_c_2", "a_b_c_3", "d_e"]


def test_a_folder_or_a_manifest(tmp_path: Path) -> None:
    for name in ("a/one.mp4", "b.mkv", "b.txt", ".hidden.mp4", "out/shard.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_raw(tmp_path, tmp_path / "out")] == ["a/one.mp4", "b.mkv"]
    manifest = tmp_path / "list.txt"
    manifest.write_text("b.mkv\n\na/one.mp4\n")
    assert [file.name for file in find_raw(manifest, tmp_path / "out")] == ["b.mkv", "a/one.mp4"]
    manifest.write_text("b.mkv\nb.mkv\n")
    with pytest.raises(ValueError, match="lists 2 files of which 1 are different"):
        find_raw(manifest, tmp_path / "out")
    manifest.write_text("gone.mkv\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.mkv, and there is no such file"):
        find_raw(manifest, tmp_path / "out")


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("one")
    (file,) = name_files(["a.mp4"], [path])
    before = file.stamp()
    assert file.stamp() == before
    path.write_text("more")
    changed = file.stamp()
    path.with_suffix(".txt").write_text("a caption")
    assert len({before, changed, file.stamp()}) == 3
