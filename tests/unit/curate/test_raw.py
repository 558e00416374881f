"""Raw files: found, named, and what the files beside them tell."""

from __future__ import annotations

import json
import os
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
    ("sidecar", "caption"),
    [
        ('{"text": "a red car"}', {"text": "a red car"}),
        ('{"captions": "a red car"}', {"text": "a red car"}),
        ('{"captions": ["a red car", "a car"]}', {"text": "a red car", "text_2": "a car"}),
        ('\ufeff{"caption": "a red car"}', {"text": "a red car"}),
        ('{"caption": "a \\ud83d car"}', {"text": "a \ufffd car"}),
        ('{"captions": {"coca": 3}}', {"name": "a"}),
        ('{"annotations": {"aesthetic": null}}', {"name": "a"}),
        ('{"annotations": null}', {"name": "a"}),
        ("[]", {"name": "a"}),
    ],
)
def test_captions_are_found_in_sidecars_of_any_shape(
    tmp_path: Path, sidecar: str, caption: dict[str, str]
) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text(sidecar)
    assert told_of(video) == {"captions": caption}


@pytest.mark.parametrize("wrong", ["not json", "", '{"elevation": "high"}', '{"elevation": 120}', "[" * 9999])
def test_an_unreadable_sidecar_or_a_wrong_elevation_is_refused_by_name(tmp_path: Path, wrong: str) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text(wrong)
    with pytest.raises(ValueError, match=r"a\.json"):
        told_of(video)


def test_windows_texts_and_caption_files_are_read(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".caption").write_bytes("un café".encode("cp1252"))
    assert told_of(video) == {"captions": {"text": "un café"}}
    video.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa car")
    assert told_of(video) == {"captions": {"text": "a car"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text,aesthetic\na.mp4,a red car,5.5\n"),
        ("metadata.csv", '\ufeffvideo,caption,aesthetic\n"a.mp4","a red car",5.5\n'),
        ("metadata.jsonl", '{"file_name": "a.mp4", "prompt": "a red car", "aesthetic": 5.5, "tags": []}\n'),
    ],
)
def test_captions_and_numbers_come_from_a_table_of_the_folder(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(content)
    (file,) = find_raw(tmp_path, tmp_path / "out")
    told = told_of(file.path, file.listed)
    assert told == {"captions": {"text": "a red car"}, "annotations": {"aesthetic": 5.5}}
    before = file.stamp()
    (tmp_path / name).write_text(content.replace("red", "blue"))
    (file,) = find_raw(tmp_path, tmp_path / "out")
    assert file.stamp() != before


def test_captions_come_from_a_list_of_prompts_next_to_a_list_of_videos(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in "ab":
        (tmp_path / "videos" / f"{name}.mp4").touch()
    (tmp_path / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\n")
    (tmp_path / "prompt.txt").write_text("a red bus, passing\na cat\n")
    files = find_raw(tmp_path, tmp_path / "out")
    assert [file.name for file in files] == ["videos/a.mp4", "videos/b.mp4"]
    captions = [told_of(file.path, file.listed)["captions"] for file in files]
    assert captions == [{"text": "a red bus, passing"}, {"text": "a cat"}]
    (tmp_path / "prompt.txt").write_text("a red bus, passing\n")
    with pytest.raises(ValueError, match=r"videos\.txt has 2 lines and .*prompt\.txt has 1"):
        find_raw(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("row", ["{", '{"text": "a"}', '{"file_name": 3}', "[1]"])
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=r"(row|line) 1 of .*metadata\.jsonl"):
        find_raw(tmp_path, tmp_path / "out")


def test_a_listed_file_that_is_missing_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\ngone.mp4,x\na.mp4,y\n")
    files = {file.name: file for file in find_raw(tmp_path, tmp_path / "out")}
    assert files.keys() == {"a.mp4", "gone.mp4"}
    assert files["gone.mp4"].stamp() == files["gone.mp4"].stamp()


def test_an_empty_folder_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no file in {tmp_path}"):
        find_raw(tmp_path, tmp_path / "out")


def test_linked_folders_are_followed_each_place_once(tmp_path: Path) -> None:
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "b.mp4").touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").touch()
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "raw")
    names = [file.name for file in find_raw(tmp_path / "raw", tmp_path / "out")]
    assert names == ["a.mp4", "linked/deep/b.mp4"]


def test_names_that_are_no_utf8_are_shown_with_replacements(tmp_path: Path) -> None:
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4"):
        (tmp_path / os.fsdecode(name)).touch()
    files = find_raw(tmp_path, tmp_path / "out")
    assert len({file.name.encode() for file in files}) == len({file.key for file in files}) == 2
    assert all(file.path.is_file() for file in files)


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
