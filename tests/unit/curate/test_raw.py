"""Raw files: discovery, names, and metadata from sidecars and lists."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from svd_ds.curate.raw import find_raw_files, name_files
from svd_ds.curate.sidecars import FolderListings, find_sidecars, read_metadata


def test_captions_come_from_the_sidecar_of_highest_precedence(tmp_path: Path) -> None:
    video = tmp_path / "A_red-car (1).mp4"
    assert read_metadata(video) == {"captions": {"name": "A red car 1"}}
    video.with_suffix(".txt").write_text("a red car\n turns left\n")
    assert read_metadata(video) == {"captions": {"text": "a red car turns left"}}
    table = video.with_suffix(".json")
    table.write_text(json.dumps({"caption": "one"}))
    assert read_metadata(video) == {"captions": {"text": "one"}}
    table.write_text(json.dumps({"captions": {"coca": "two", "llm": "three"}}))
    assert read_metadata(video) == {"captions": {"coca": "two", "llm": "three"}}
    table.write_text(json.dumps({"elevation": 10, "annotations": {"text_area": 0.05}}))
    assert read_metadata(video) == {
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
    assert read_metadata(video) == {"captions": caption}


@pytest.mark.parametrize("wrong", ["not json", "", '{"elevation": "high"}', '{"elevation": 120}', "[" * 9999])
def test_unreadable_sidecar_and_wrong_elevation_are_refused_by_name(tmp_path: Path, wrong: str) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text(wrong)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_metadata(video)


def test_windows_texts_and_caption_files_are_read(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".caption").write_bytes("un café".encode("cp1252"))
    assert read_metadata(video) == {"captions": {"text": "un café"}}
    video.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa car")
    assert read_metadata(video) == {"captions": {"text": "a car"}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text,aesthetic\na.mp4,a red car,5.5\n"),
        ("metadata.csv", '\ufeffvideo,caption,aesthetic\n"a.mp4","a red car",5.5\n'),
        ("metadata.jsonl", '{"file_name": "a.mp4", "prompt": "a red car", "aesthetic": 5.5, "tags": []}\n'),
    ],
)
def test_captions_and_numbers_are_read_from_a_table_of_the_folder(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(content)
    (file,) = find_raw_files(tmp_path, tmp_path / "out")
    metadata = read_metadata(file.path, file.listed)
    assert metadata == {"captions": {"text": "a red car"}, "annotations": {"aesthetic": 5.5}}
    before = file.stamp()
    (tmp_path / name).write_text(content.replace("red", "blue"))
    (file,) = find_raw_files(tmp_path, tmp_path / "out")
    assert file.stamp() != before


def test_captions_are_read_from_lists_of_videos_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in "ab":
        (tmp_path / "videos" / f"{name}.mp4").touch()
    (tmp_path / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\n")
    (tmp_path / "prompt.txt").write_text("a red bus, passing\na cat\n")
    files = find_raw_files(tmp_path, tmp_path / "out")
    assert [file.name for file in files] == ["videos/a.mp4", "videos/b.mp4"]
    captions = [read_metadata(file.path, file.listed)["captions"] for file in files]
    assert captions == [{"text": "a red bus, passing"}, {"text": "a cat"}]
    (tmp_path / "prompt.txt").write_text("a red bus, passing\n")
    with pytest.raises(ValueError, match=r"videos\.txt has 2 lines and .*prompt\.txt has 1"):
        find_raw_files(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("row", ["{", '{"text": "a"}', '{"file_name": 3}', "[1]", '{"file_name": null}'])
def test_bad_row_of_a_table_is_reported_and_the_others_are_read(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.mp4").touch()
    table = tmp_path / "metadata.jsonl"
    table.write_text(f'{row}\n{{"file_name": "a.mp4", "text": "a car"}}\n{row}\n')
    files = {file.name: file for file in find_raw_files(tmp_path, tmp_path / "out")}
    assert files["a.mp4"].listed == {"text": "a car"} and files["a.mp4"].fault is None
    fault = files["metadata.jsonl"].fault
    assert fault is not None and fault.endswith("; and 1 more rows like it")
    assert re.match(r"(row|its line) 1 ", fault)
    assert len(files) == 2


@pytest.mark.parametrize(
    "content",
    [
        "file_name;text\na.mp4;a red car\n",
        "File Name\tCaption\na.mp4\ta red car\n",
        'filename,text\r\n"a.mp4","a red\r\ncar"\r\n',
        "path,text\n./a.mp4,a red car\n",
        "path,text\nsome\\where\\a.mp4,a red car\n",
        "path,text\n/home/else/a.mp4,a red car\n",
        "video,text\na,a red car\n",
        "video,text\n%61.mp4,a red car\n",
    ],
)
def test_tables_name_files_in_many_ways(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text(content, newline="")
    (file,) = find_raw_files(tmp_path, tmp_path / "out")
    (caption,) = read_metadata(file.path, file.listed)["captions"].values()
    assert caption.split() == ["a", "red", "car"]


def test_captions_of_several_rows_of_a_file_are_merged(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    rows = "file_name,text,aesthetic\na.mp4,a car,5\na.mp4,a red car,6\na.mp4,a car,7\n"
    (tmp_path / "metadata.csv").write_text(rows)
    (file,) = find_raw_files(tmp_path, tmp_path / "out")
    metadata = read_metadata(file.path, file.listed)
    assert metadata == {
        "captions": {"text": "a car", "text_2": "a red car"},
        "annotations": {"aesthetic": 5.0},
    }


def test_unquoted_commas_are_kept_and_unclosed_quotes_reported(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.mp4").touch()
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,text\na.mp4,a red car, turning left\nb.mp4,"a blue car\nc.mp4,a cat\n')
    files = {file.name: file for file in find_raw_files(tmp_path, tmp_path / "out")}
    assert files["a.mp4"].listed == {"text": "a red car, turning left"}
    assert files["metadata.csv"].fault == ("row 2 has an unclosed quote: the rest of the file is not read")
    table.write_text("text,file_name\na red car, turning left,a.mp4\na cat,b.mp4\n")
    files = {file.name: file for file in find_raw_files(tmp_path, tmp_path / "out")}
    assert files["metadata.csv"].fault == "row 1 has 3 cells, but the header has 2"
    assert files["b.mp4"].listed == {"text": "a cat"}


def test_listed_file_does_not_match_another_folder(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\ngone/a.mp4,a red car\n")
    files = {file.name: file for file in find_raw_files(tmp_path, tmp_path / "out")}
    assert files["a.mp4"].listed == {}
    assert files["gone/a.mp4"].fault == "it is listed, but does not exist"


def test_missing_listed_file_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\ngone.mp4,x\na.mp4,y\n")
    files = {file.name: file for file in find_raw_files(tmp_path, tmp_path / "out")}
    assert files.keys() == {"a.mp4", "gone.mp4"}
    assert files["gone.mp4"].fault == "it is listed, but does not exist"
    assert files["gone.mp4"].stamp() == files["gone.mp4"].stamp()


def test_pipes_and_broken_links_are_reported(tmp_path: Path) -> None:
    (tmp_path / "raw" / "folder.mp4").mkdir(parents=True)
    os.mkfifo(tmp_path / "raw" / "pipe.mp4")
    (tmp_path / "raw" / "link.mp4").symlink_to("nowhere")
    (tmp_path / "raw" / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "raw" / "folder.mp4" / "inside.mp4").touch()
    faults = {file.name: file.fault for file in find_raw_files(tmp_path / "raw", tmp_path / "out")}
    assert faults == {
        "folder.mp4/inside.mp4": None,
        "link.mp4": "it is a broken link",
        "loop.mp4": "it is a broken link",
        "pipe.mp4": "it is not a regular file",
    }


def test_longest_names_leave_room_for_suffixes(tmp_path: Path) -> None:
    for letter in ("a", "b", "é"):
        name = letter * (251 // len(letter.encode())) + ".mp4"
        (tmp_path / name).touch()
    files = find_raw_files(tmp_path, tmp_path / "out")
    assert [read_metadata(file.path)["captions"].keys() for file in files] == [{"name"}] * 3
    assert len({file.key for file in files}) == 3
    assert all(len(file.key.encode()) < 130 and isinstance(file.stamp(), int) for file in files)


@pytest.mark.parametrize("name", ["a.TXT", "a.Caption", "a.mp4.txt", "a.mp4.json", "a.JSON", "a.prompt"])
def test_sidecars_of_any_spelling_are_read_and_are_no_raw_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").touch()
    is_json = name.lower().endswith("json")
    (tmp_path / name).write_text('"a red car"' if is_json else "a red car")
    (file,) = find_raw_files(tmp_path, tmp_path / "out")
    assert read_metadata(file.path) == {"captions": {"text": "a red car"}}


def test_text_without_a_video_is_a_raw_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.txt", "a.b.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in find_raw_files(tmp_path, tmp_path / "out")] == ["a.b.txt", "a.mp4", "b.txt"]


def test_damaged_sidecar_does_not_hide_the_caption_of_another(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text("{")
    video.with_suffix(".txt").write_text("a red car")
    assert read_metadata(video) == {"captions": {"text": "a red car"}}


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no file in {tmp_path}"):
        find_raw_files(tmp_path, tmp_path / "out")


def test_linked_folders_are_followed_once_each(tmp_path: Path) -> None:
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "b.mp4").touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").touch()
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "raw")
    names = [file.name for file in find_raw_files(tmp_path / "raw", tmp_path / "out")]
    assert names == ["a.mp4", "linked/deep/b.mp4"]


def test_names_that_are_not_utf8_get_replacement_characters(tmp_path: Path) -> None:
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4"):
        (tmp_path / os.fsdecode(name)).touch()
    files = find_raw_files(tmp_path, tmp_path / "out")
    assert len({file.name.encode() for file in files}) == len({file.key for file in files}) == 2
    assert all(file.path.is_file() for file in files)


def test_keys_are_unique() -> None:
    names = ["a b/c.mp4", "a b/c.mov", "a_b/c.mp4", "d.e.mp4"]
    assert [file.key for file in name_files(names, [Path()] * 4)] == ["a_b_c", "a_b_c_2", "a_b_c_3", "d_e"]


def test_raw_files_are_found_in_a_folder_or_a_manifest(tmp_path: Path) -> None:
    for name in ("a/one.mp4", "b.mkv", "b.txt", ".hidden.mp4", "out/shard.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_raw_files(tmp_path, tmp_path / "out")] == ["a/one.mp4", "b.mkv"]
    manifest = tmp_path / "list.txt"
    manifest.write_text("b.mkv\n\na/one.mp4\n")
    assert [file.name for file in find_raw_files(manifest, tmp_path / "out")] == ["b.mkv", "a/one.mp4"]
    manifest.write_text("b.mkv\ngone.mkv\nb.mkv\n")
    faults = {file.name: file.fault for file in find_raw_files(manifest, tmp_path / "out")}
    assert faults == {"b.mkv": None, "gone.mkv": "it is listed, but does not exist"}


def test_stamp_changes_with_the_file_and_its_sidecars(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("one")
    (file,) = name_files(["a.mp4"], [path])
    before = file.stamp()
    assert file.stamp() == before
    path.write_text("more")
    changed = file.stamp()
    path.with_suffix(".txt").write_text("a caption")
    assert len({before, changed, file.stamp()}) == 3


def test_folder_listings_find_the_same_sidecars_as_single_lookups(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.TXT", "b.mp4", "b.mp4.json", "c.mp4", "d.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "c.txt").mkdir()
    (tmp_path / "d.txt").symlink_to(tmp_path / "gone")
    is_file = FolderListings().is_file
    videos = [tmp_path / f"{stem}.mp4" for stem in "abcd"]
    found = [find_sidecars(video, is_file) for video in videos]
    assert found == [[tmp_path / "a.TXT"], [tmp_path / "b.mp4.json"], [], []]
    assert found == [find_sidecars(video) for video in videos]
    assert find_sidecars(tmp_path / "missing" / "a.mp4", is_file) == []
