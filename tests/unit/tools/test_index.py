"""tools/index.py: external shards are used in place for training."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from svd_ds.data import indexing
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from tests.unit.data.test_fuzz import picture
from tests.videos import counting, encode, moving_square


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def index(run_tool: Callable[..., int]) -> Callable[..., int]:
    return partial(run_tool, "index.py")


def test_external_shards_are_indexed_in_place(
    tmp_path: Path, index: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    moving, still = encode(moving_square(8, 32, 48)), encode(counting(8, 32, 48), suffix="matroska")
    write_tar(
        tmp_path / "a.tar",
        {
            "000.video.mp4": moving,
            "000.json": json.dumps({"caption": "it moves", "annotations": {"aesthetic": 5}}).encode(),
            "001.mkv": still,
            "001.txt": b"it is still ",
            "002.mp4": moving[:900],
            "002.txt": b"broken",
            "003.txt": b"no pixels",
            "004.mp4": b"text",
        },
    )
    write_tar(tmp_path / "sub" / "b.tar", {"x/000.png": picture(9, 8), "x/000.json": b"{}"})
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    assert index(tmp_path) == 0, capsys.readouterr().err
    found = Index.load(tmp_path)
    samples = {sample.id: sample for sample in found.samples()}
    assert list(samples) == ["a-000", "a-001", "sub_b-x_000"]
    video, still_video, image = samples.values()
    assert (video.num_frames, video.fps, video.height, video.width) == (8, 24.0, 32, 48)
    assert video.motion > 10 * still_video.motion and video.annotations == {"aesthetic": 5}
    assert (image.num_frames, image.fps, image.motion) == (1, 1.0, 0)
    refused = (tmp_path / "refused.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in refused] == ["sample", "a-002", "a-003", "a-004", ""]
    assert not (tmp_path / ".index-parts").exists()

    data = DataConfig(str(tmp_path), 4, 16, 16, fps=0, num_workers=0)
    batches = [batch for batch, _ in islice(Loader(data, 0, 0, 1, BatchConfig(2)), 2)]
    assert {text for batch in batches for text in batch.captions} == {"it moves", "it is still"}
    assert index(tmp_path) == 2 and "--overwrite it" in capsys.readouterr().err
    assert index(tmp_path, "--overwrite", "--no-motion") == 0
    assert {sample.motion for sample in Index.load(tmp_path).samples()} == {0}


def image_tar(path: Path, keys: str, number: int = 1) -> None:
    write_tar(path, {f"{key}.png": picture(number, 8) for key in keys})


def ids(folder: Path) -> list[str]:
    return [sample.id for sample in Index.load(folder).samples()]


def reasons(folder: Path) -> dict[str, str]:
    """Sample, or shard if a complete shard is refused -> reason."""
    with open(folder / "refused.csv", newline="", encoding="utf-8") as file:
        return {row["sample"] or row["shard"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture
def stopped(tmp_path: Path, index: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of m.tar and n.tar whose indexing was interrupted between probing and writing the index."""
    for name, keys in {"m": "012", "n": "34"}.items():
        image_tar(tmp_path / f"{name}.tar", keys)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "write_index", stop)
        assert index(tmp_path) == 130
    assert not (tmp_path / "index.jsonl").exists()
    return tmp_path


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are probed from now on."""
    names: list[str] = []
    real = indexing.probe_shard
    monkeypatch.setattr(
        indexing, "probe_shard", lambda path, name, motion: names.append(name) or real(path, name, motion)
    )
    return names


def test_restarted_index_does_not_probe_known_shards_again(
    stopped: Path, index: Callable[..., int], probed: list[str]
) -> None:
    assert index(stopped) == 0
    assert probed == [] and ids(stopped) == ["m-0", "m-1", "m-2", "n-3", "n-4"]
    assert not (stopped / ".index-parts").exists()


def test_restarted_index_matches_shards_by_name_and_state(
    stopped: Path, index: Callable[..., int], probed: list[str]
) -> None:
    image_tar(stopped / "a.tar", "78")
    (stopped / "n.tar").unlink()
    state = (stopped / "m.tar").stat()
    image_tar(stopped / "m.tar", "567", number=9)
    os.utime(stopped / "m.tar", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (stopped / "m.tar").stat().st_size == state.st_size, "the same size and time, other content"
    assert index(stopped) == 0
    assert probed == ["a.tar", "m.tar"] and ids(stopped) == ["a-7", "a-8", "m-5", "m-6", "m-7"]
    found = Index.load(stopped)
    for sample in found.samples():
        assert found.read(sample, "png").startswith(b"\x89PNG"), "offsets belong to the right shard"


def test_renamed_shards_and_damaged_parts_are_probed_again(
    stopped: Path, index: Callable[..., int], probed: list[str]
) -> None:
    (stopped / "m.tar").rename(stopped / "x.tar")
    for part in (stopped / ".index-parts").iterdir():
        part.write_bytes(part.read_bytes()[:-30])
    assert index(stopped) == 0
    assert probed == ["n.tar", "x.tar"] and ids(stopped) == ["n-3", "n-4", "x-0", "x-1", "x-2"]


def test_parts_without_motion_are_not_reused_with_motion(
    stopped: Path, index: Callable[..., int], probed: list[str]
) -> None:
    assert index(stopped, "--no-motion") == 0 and probed == ["m.tar", "n.tar"]


def test_odd_files_do_not_affect_other_shards(
    tmp_path: Path, index: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    image_tar(tmp_path / "good.tar", "0")
    image_tar(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")), "0")
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    image_tar(tmp_path / "line\n.tar", "0")
    (tmp_path / "._good.tar").write_bytes(b"resource fork")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.tar").write_bytes(b"resource fork")
    assert index(tmp_path) == 0, capsys.readouterr().err
    assert ids(tmp_path) == ["good-0"]
    refused = reasons(tmp_path)
    assert refused.keys() == {"caf\ufffd.tar", "fifo.tar", "lost.tar", "empty.tar", "line\n.tar"}
    assert refused["fifo.tar"] == "it is not a regular file" and "No such file" in refused["lost.tar"]
    assert refused["caf\ufffd.tar"] == "its name is not UTF-8: rename it"
    assert [shard.name for shard in Index.load(tmp_path).shards] == ["good.tar"]


def test_ids_of_all_shards_differ(tmp_path: Path, index: Callable[..., int]) -> None:
    image_tar(tmp_path / "a-b.tar", "c")
    write_tar(tmp_path / "a.tar", {f"{key}.png": picture(1, 8) for key in ("b-c", "x y", "x_y")})
    assert index(tmp_path) == 0
    assert ids(tmp_path) == ["a-b-c", "a-b-c_2", "a-x_y", "a-x_y_2"]


def test_linked_folders_are_followed_without_loops(tmp_path: Path, index: Callable[..., int]) -> None:
    store, folder = tmp_path / "store", tmp_path / "folder"
    image_tar(store / "deep" / "a.tar", "0")
    image_tar(folder / "b.tar", "0")
    (folder / "loop").symlink_to(folder)
    (folder / "part").symlink_to(store)
    (folder / "part2").symlink_to(store)
    (store / "up").symlink_to(tmp_path)
    (folder / "again.tar").symlink_to(folder / "b.tar")
    assert index(folder) == 0
    assert ids(folder) == ["b-0", "part_deep_a-0"]


def test_index_of_a_read_only_folder_is_written_to_out(
    tmp_path: Path, index: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "shards", tmp_path / "a" / "index"
    frames = encode(moving_square(8, 32, 48))
    write_tar(folder / "sub" / "a.tar", {f"{key}.mp4": frames for key in "01"})
    before = sorted(folder.rglob("*"))
    assert index(folder, "--out", out) == 0, capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before, "nothing is written next to the shards"
    assert ids(out) == ["sub_a-0", "sub_a-1"]
    data = DataConfig(str(out), 4, 16, 16, fps=0, num_workers=0)
    (batch, _) = next(iter(Loader(data, 0, 0, 1, BatchConfig(2))))
    assert set(batch.ids) == {"sub_a-0", "sub_a-1"}
    assert index(folder, "--out", out) == 2 and "--overwrite it" in capsys.readouterr().err
    other = tmp_path / "other"
    image_tar(other / "b.tar", "0")
    assert index(other, "--out", out, "--overwrite") == 0 and ids(out) == ["b-0"]
    assert index(tmp_path / "nowhere") == 2 and "there is no folder" in capsys.readouterr().err


def test_read_only_folder_is_reported_with_the_remedy(
    tmp_path: Path,
    index: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image_tar(tmp_path / "a.tar", "0")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert index(tmp_path) == 2
    assert f"{tmp_path} cannot be written to (Read-only file system): choose" in capsys.readouterr().err


def test_summary_counts_missing_captions_and_odd_samples(
    tmp_path: Path, index: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    image, odd = picture(1, 8), {"a": math.nan, "b": math.inf, "c": True, "d": 3}
    members = {
        "0.png": image,
        "1.png": image,
        "1.json": json.dumps({"caption": "x", "annotations": odd}).encode(),
        "2.png": image,
        "2.txt": "café".encode("cp1252"),
        "3.png": image,
        "3.depth.png": image,
        "4.txt": b"no picture",
    }
    write_tar(tmp_path / "a.tar", members)
    assert index(tmp_path) == 0
    stdout = capsys.readouterr().out
    assert "4 samples in 1 shards; 1 refused" in stdout and "refused.csv says why" in stdout
    assert "2 of 4 samples have no caption" in stdout
    assert "1 of 4 samples have a caption that is not UTF-8" in stdout
    assert "1 of 4 samples have several videos or images" in stdout
    assert "3 annotations are not finite numbers" in stdout
    assert "NaN" not in (tmp_path / "index.jsonl").read_text()
