"""Samples of external shards are grouped, captioned, and refused one by one."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from svd_ds.data import external_shards
from svd_ds.data.external_shards import (
    NO_CAPTION,
    NOT_UTF8,
    SEVERAL_MEDIA,
    ProbedSample,
    choose_media,
    probe_shard,
)
from svd_ds.data.indexing import index_folder
from svd_ds.data.quarantine import Fault
from svd_ds.data.reader import read_captions
from svd_ds.data.sample import Sample
from tests.unit.data.test_fuzz import picture
from tests.videos import counting, encode

IMAGE = picture(1, 8)
Files = list[tuple[str, bytes]]


def pack(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def probe(tmp_path: Path) -> Callable[[Files], tuple[dict[str, ProbedSample], list[Fault]]]:
    def run(files: Files) -> tuple[dict[str, ProbedSample], list[Fault]]:
        items = list(probe_shard(pack(tmp_path / "a.tar", files), "a.tar", None))
        faults = [item for item in items if isinstance(item, Fault)]
        return {item.sample.id: item for item in items if isinstance(item, ProbedSample)}, faults

    return run


def captions(folder: Path, sample: Sample) -> dict[str, str]:
    """Read the captions of a sample as the reader does."""
    content = (folder / "a.tar").read_bytes()

    def read(member: str, begin: int = 0, number: int | None = None) -> bytes:
        offset, size = sample.members[member]
        return content[offset : offset + size]

    return read_captions(read, sample)


def as_json(metadata: Any) -> bytes:
    return json.dumps(metadata).encode()


def test_members_are_grouped_wherever_they_are_in_the_tar(tmp_path: Path, probe: Callable) -> None:
    files = [(f"{key}.png", IMAGE) for key in ("x/0", "y/0", "1")]
    files += [("y/0.txt", b"y"), ("1.json", as_json({"caption": "one"})), ("x/0.txt", b"x")]
    found, faults = probe(files)
    assert not faults
    texts = {key: captions(tmp_path, item.sample) for key, item in found.items()}
    assert texts == {"a-x_0": {"text": "x"}, "a-y_0": {"text": "y"}, "a-1": {"text": "one"}}


@pytest.mark.parametrize(
    ("sidecars", "caption", "notes"),
    [
        ({"json": {"caption": ["a", "b"]}}, {"text": "a", "text_2": "b"}, {}),
        ({"info.json": {"script": "none"}, "png.json": {"caption": "a"}}, {"text": "a"}, {}),
        ({"png.json": {"caption": "b"}, "json": {"caption": "a"}}, {"text": "a"}, {}),
        ({"info.json": {"text": "b"}, "png.json": {"text": "a"}}, {"text": "a"}, {}),
        ({"json": {"captions": {"short": None}}, "txt": b"a"}, {"text": "a"}, {}),
        ({"json": b"{", "txt": b"a"}, {"text": "a"}, {}),
        ({"TXT": "é".encode("cp1252")}, {"text": "é"}, {NOT_UTF8: 1}),
        ({"txt": "é".encode("utf-8-sig")}, {"text": "é"}, {}),
        ({"prompt.txt": b"b", "caption": b"a"}, {"text": "a"}, {}),
        ({"json": ["a"]}, {"text": "a"}, {}),
        ({"txt": b" \n"}, {"text": ""}, {NO_CAPTION: 1}),
        ({"json": {"captions": {"short": None}}}, {"text": ""}, {NO_CAPTION: 1}),
        ({"json": None}, {"text": ""}, {NO_CAPTION: 1}),
        ({}, {"text": ""}, {NO_CAPTION: 1}),
    ],
)
def test_captions_in_any_layout_are_found_or_counted(
    tmp_path: Path, probe: Callable, sidecars: dict[str, Any], caption: dict[str, str], notes: dict[str, int]
) -> None:
    files = [("0.png", IMAGE)]
    files += [
        (f"0.{extension}", metadata if isinstance(metadata, bytes) else as_json(metadata))
        for extension, metadata in sidecars.items()
    ]
    found, faults = probe(files)
    assert not faults
    assert found["a-0"].notes == notes
    assert captions(tmp_path, found["a-0"].sample) == caption


@pytest.mark.parametrize(
    ("sidecars", "reason"),
    [
        ({"json": b"{"}, "its json cannot be read"),
        ({"json": b"[" * 100_000}, "its json cannot be read"),
        ({"info.json": b"\x81"}, "its info.json cannot be read"),
        ({"txt": b"\x81\xff"}, "its text is neither UTF-8"),
        ({"rgb.png": b"x", "depth.png": b"x", "png": None}, "it has 2 images (depth.png, rgb.png)"),
        ({"png": b"no image"}, "the file cannot be decoded"),
        ({"png": b""}, "the file cannot be decoded"),
        ({"png": None, "txt": b"x"}, "none of its members (txt) is a video or an image"),
    ],
)
def test_unusable_sample_does_not_affect_others(
    probe: Callable, sidecars: dict[str, bytes | None], reason: str
) -> None:
    members = {"png": IMAGE, **sidecars}
    bad = [(f"bad.{name}", content) for name, content in members.items() if content is not None]
    found, faults = probe([("0.png", IMAGE), *bad, ("1.png", IMAGE)])
    assert list(found) == ["a-0", "a-1"]
    (fault,) = faults
    assert fault.id == "a-bad" and reason in fault.cause


@pytest.mark.parametrize("annotations", [None, [1], "text", 5, {"a": None}, {"a": [1]}, {"a": {"b": 1}}])
def test_annotations_of_any_type_do_not_refuse_a_sample(probe: Callable, annotations: Any) -> None:
    found, faults = probe([("0.png", IMAGE), ("0.json", as_json({"annotations": annotations}))])
    assert not faults and found["a-0"].sample.annotations == {}


def test_annotations_of_several_jsons_are_merged(probe: Callable) -> None:
    first, second = {"annotations": {"a": 1}, "caption": "x"}, {"annotations": {"a": 2, "b": 3}}
    found, _ = probe([("0.png", IMAGE), ("0.info.json", as_json(second)), ("0.json", as_json(first))])
    assert found["a-0"].sample.annotations == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("x"),
        RecursionError("deep"),
        SyntaxError("png"),
        av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_any_error_refuses_only_its_sample(
    probe: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = external_shards.measure_media

    def measure(content: bytes, still: bool) -> tuple[int, float, int, int]:
        if content == b"bad":
            raise error
        return real(content, still)

    monkeypatch.setattr(external_shards, "measure_media", measure)
    found, (fault,) = probe([("0.png", b"bad"), ("1.png", IMAGE)])
    assert list(found) == ["a-1"] and fault.id == "a-0"
    assert type(error).__name__ in fault.cause or "cannot be decoded" in fault.cause


def test_out_of_memory_is_raised(probe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(content: bytes, still: bool) -> tuple[int, float, int, int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(external_shards, "measure_media", measure)
    with pytest.raises(MemoryError, match=r"memory ran out while a\.tar was read"):
        probe([("0.png", IMAGE)])


def test_concatenated_tars_are_read_as_one(tmp_path: Path) -> None:
    first, second = (
        pack(tmp_path / f"{name}.tar", [(f"{name}.png", IMAGE), (f"{name}.txt", name.encode())])
        for name in "ab"
    )
    bare = first.read_bytes().rstrip(b"\0")
    bare += bytes(-len(bare) % 512)
    for between in (bytes(0), bytes(512), bytes(1024), bytes(10240)):
        path = tmp_path / "joined.tar"
        path.write_bytes(bare + between + second.read_bytes())
        items = [item for item in probe_shard(path, "joined.tar", None) if isinstance(item, ProbedSample)]
        assert [item.sample.id for item in items] == ["joined-a", "joined-b"]
        content = path.read_bytes()
        for item, text in zip(items, (b"a", b"b"), strict=True):
            offset, size = item.sample.members["txt"]
            assert content[offset : offset + size] == text
    path.write_bytes(first.read_bytes() + b"junk" * 300)
    *kept, fault = probe_shard(path, "joined.tar", None)
    assert [type(item) for item in kept] == [ProbedSample]
    assert isinstance(fault, Fault) and "cannot be read to its end" in fault.cause


def test_links_in_a_tar_are_listed(tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path / "a.tar", [("0.png", IMAGE)]), "a") as tar:
        for number, kind in enumerate((tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE), 1):
            entry = tarfile.TarInfo(f"{number}.png")
            entry.type, entry.linkname = kind, "0.png"
            tar.addfile(entry)
    items = list(probe_shard(tmp_path / "a.tar", "a.tar", None))
    faults = {item.id: item.cause for item in items if isinstance(item, Fault)}
    assert faults.keys() == {"1.png", "2.png", "3.png"} and "it is a link in the tar" in faults["1.png"]
    assert len(items) == 4


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.xz"])
def test_compressed_tars_are_listed(tmp_path: Path, suffix: str) -> None:
    whole = pack(tmp_path / "whole.tar", [("0.png", IMAGE)]).read_bytes()
    compress = lzma.compress if suffix.endswith("xz") else gzip.compress
    (tmp_path / f"packed.{suffix}").write_bytes(compress(whole))
    found = index_folder(tmp_path, tmp_path, None, False, list)
    assert [sample.id for sample in found.samples] == ["whole-0"]
    (fault,) = found.faults
    assert fault.shard == f"packed.{suffix}" and "it is compressed" in fault.cause


def test_long_videos_without_presentation_times_are_refused(
    probe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_shards, "MAX_UNTIMED_FRAMES", 10)
    with_b_frames = encode(counting(12), suffix="avi", options={"bf": "2"})
    without = encode(counting(12), suffix="avi", options={"bf": "0"})
    found, (fault,) = probe([("0.avi", with_b_frames), ("1.avi", without)])
    assert list(found) == ["a-1"] and found["a-1"].sample.num_frames == 12
    assert "it has no presentation times, and more than 10 frames" in fault.cause


def test_hidden_files_and_macos_forks_are_ignored(tmp_path: Path, probe: Callable) -> None:
    files: Files = []
    for key in ("0", "d/1"):
        folder, _, name = key.rpartition("/")
        for extension, content in (("txt", b"text"), ("png", IMAGE)):
            fork = f"{folder}/._{name}.{extension}".lstrip("/")
            files += [(fork, b"fork"), (f"__MACOSX/{fork}", b"fork"), (f"{key}.{extension}", content)]
    found, faults = probe([*files, (".DS_Store", b"x"), ("d/.DS_Store", b"x")])
    assert not faults
    texts = {key: captions(tmp_path, item.sample) for key, item in found.items()}
    assert texts == {"a-0": {"text": "text"}, "a-d_1": {"text": "text"}}


def test_names_that_are_not_utf8_do_not_refuse_a_sample(probe: Callable) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    found, faults = probe([(f"{name}.png", IMAGE), (f"{name}.txt", b"a"), (f"{name}2.txt", b"a")])
    assert list(found) == ["a-caf_"] and not found["a-caf_"].notes
    assert json.dumps(faults[0].cause, ensure_ascii=False).encode(), "every text can be encoded"


def test_last_of_several_files_of_one_name_counts(tmp_path: Path, probe: Callable) -> None:
    found, faults = probe([("0.png", b"old"), ("0.txt", b"new"), ("0.png", IMAGE)])
    assert captions(tmp_path, found["a-0"].sample) == {"text": "new"}
    assert [(fault.id, fault.cause) for fault in faults] == [
        ("0.png", "the tar has a later file of the same name, which is used")
    ]


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        (["mp4", "jpg"], "mp4"),
        (["depth.mp4", "mp4"], "mp4"),
        (["video.mp4"], "video.mp4"),
        (["mp4.json", "mp4"], "mp4"),
        (["rgb.mp4", "jpg"], "rgb.mp4"),
    ],
)
def test_plain_video_is_chosen(members: list[str], chosen: str) -> None:
    assert choose_media(members) == chosen


@pytest.mark.parametrize("members", [["rgb.mp4", "depth.mp4"], ["mp4", "mkv"], ["jpg", "png"]])
def test_several_videos_of_equal_rank_are_refused_by_name(members: list[str]) -> None:
    with pytest.raises(ValueError, match="it has 2 ") as error:
        choose_media(members)
    assert all(name in str(error.value) for name in members)


def test_choice_among_several_videos_is_noted(probe: Callable) -> None:
    found, _ = probe([("0.png", IMAGE), ("0.depth.png", b"x"), ("0.txt", b"x")])
    assert found["a-0"].notes == {SEVERAL_MEDIA: 1}


@pytest.mark.parametrize(("cut", "kept"), [(550, 0), (700, 1), (1024, 1), (1100, 1), (2048, 2), (2100, 2)])
def test_samples_before_the_end_of_a_cut_tar_are_kept(tmp_path: Path, cut: int, kept: int) -> None:
    path = pack(tmp_path / "a.tar", [("0.png", IMAGE), ("1.png", IMAGE), ("2.png", IMAGE)])
    path.write_bytes(path.read_bytes()[:cut])
    items = list(probe_shard(path, "a.tar", None))
    assert [item.sample.id for item in items if isinstance(item, ProbedSample)] == ["a-0", "a-1"][:kept]
    assert isinstance(items[-1], Fault) and items[-1].id == ""


def test_samples_lost_after_a_damaged_header_are_reported(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", [("0.png", IMAGE), ("1.png", IMAGE), ("2.png", IMAGE)])
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 1
    path.write_bytes(content)
    first, fault = probe_shard(path, "a.tar", None)
    assert isinstance(first, ProbedSample) and isinstance(fault, Fault)
    assert fault.cause == "the tar cannot be read to its end: it is cut short or damaged at byte 1024"
