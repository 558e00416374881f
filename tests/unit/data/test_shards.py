"""Shards and their index: contents, and errors that name the damage."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from svd_ds.data.motion import MotionMap
from svd_ds.data.shards import Index
from tests.videos import write_shards


def test_index_reads_every_member(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 1, 2])
    index = Index.load(tmp_path)
    assert index.shard_sizes == (3, 1, 2)
    assert [sample.id for sample in index.samples()] == [f"s{n:04d}" for n in range(6)]
    assert index.sample(4).id == "s0004"
    for sample in index.samples():
        with tarfile.open(tmp_path / index.shards[sample.shard].name) as tar:
            for member in sample.members:
                stored = tar.extractfile(f"{sample.id}.{member}")
                assert stored is not None and stored.read() == index.read(sample, member)
        assert json.loads(index.read(sample, "json"))["num_frames"] == sample.num_frames == 6


def test_keep_selects_samples(tmp_path: Path) -> None:
    index = Index.load(write_shards(tmp_path, [3, 1, 2]))
    kept = index.keep(lambda sample: sample.id not in ("s0001", "s0003"))
    assert [sample.id for sample in kept.samples()] == ["s0000", "s0002", "s0004", "s0005"]
    assert kept.shard_sizes == (2, 0, 2)
    assert index.keep(lambda sample: True).fingerprint == index.fingerprint
    fingerprints = {index.keep(lambda sample, n=n: sample.id != f"s000{n}").fingerprint for n in range(6)}
    assert len(fingerprints | {index.fingerprint}) == 7


def test_motion_map_is_read_back(tmp_path: Path) -> None:
    assert Index.load(write_shards(tmp_path, [4])).motion_map == MotionMap.calibrate([0.01, 0.02, 0.03, 0.04])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no data folder .*nowhere"):
        Index.load(tmp_path / "nowhere")
    write_shards(tmp_path, [1, 1])
    (tmp_path / "shard-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*shard-00001\.tar is missing"):
        Index.load(tmp_path)


def test_truncated_shard_is_named_with_both_sizes(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 2])
    path = tmp_path / "shard-00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(
        ValueError, match=rf"shard-00001\.tar has 5000 bytes, .* {len(whole)}: it is truncated"
    ):
        Index.load(tmp_path)


def test_shard_that_shrinks_later_is_named(tmp_path: Path) -> None:
    index = Index.load(write_shards(tmp_path, [1]))
    (tmp_path / "shard-00000.tar").write_bytes(bytes(1600))
    with pytest.raises(ValueError, match=r"shard-00000\.tar holds 64 of the \d+ bytes of s0000\.mp4"):
        index.read(index.sample(0), "mp4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with the header"),
        (b"not json\n", "does not begin with the header"),
        (b'{"id": "a"}\n', "does not begin with the header"),
        (b'{"format": "svd_ds shards", "version": 9}\n', "version 9; this program reads 1"),
    ],
)
def test_index_of_another_format_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "index.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path)


def test_index_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [3]) / "index.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="lists 2 of its 3 samples"):
        Index.load(tmp_path)


def test_index_replaced_during_the_run_is_named(tmp_path: Path) -> None:
    index = Index.load(write_shards(tmp_path, [2, 2]))
    path = tmp_path / "index.jsonl"
    path.write_text(path.read_text().replace('"s0002"', '"another"'))
    with pytest.raises(ValueError, match=r"index\.jsonl was changed after it was read: restart the run"):
        index.sample(3)
    with pytest.raises(ValueError, match=r"index\.jsonl was changed"):
        list(index.samples())
