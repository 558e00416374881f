"""Writing of shards: reproducible bytes, no partial files, and resuming after an earlier writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.data.shards import Index
from svd_ds.data.writer import ShardWriter
from tests.videos import encode, moving_square, sample_metadata, write_shards


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_long_ids_are_read(tmp_path: Path) -> None:
    frames = moving_square(2)
    writer = ShardWriter(tmp_path)
    writer.add("x" * 300, "mp4", encode(frames), sample_metadata(frames))
    writer.close()
    index = Index.load(tmp_path)
    assert json.loads(index.read(index.sample(0), "json"))["num_frames"] == 2


def test_same_samples_give_same_bytes_and_no_partial_files(tmp_path: Path) -> None:
    one, other = (files(write_shards(tmp_path / name, [2, 3])) for name in ("one", "other"))
    assert one == other
    assert list(one) == ["index.jsonl", "shard-00000.tar", "shard-00001.tar"]


def test_index_is_written_only_by_close(tmp_path: Path) -> None:
    frames = moving_square(2)
    writer = ShardWriter(tmp_path, samples_per_shard=1)
    writer.add("a", "mp4", encode(frames), sample_metadata(frames))
    with pytest.raises(FileNotFoundError, match=r"has no index\.jsonl"):
        Index.load(tmp_path)


def test_writer_refuses_invalid_arguments(tmp_path: Path) -> None:
    frames = moving_square(2)
    writer = ShardWriter(tmp_path)
    writer.add("a", "mp4", b"", sample_metadata(frames))
    with pytest.raises(ValueError, match="two samples have the id a"):
        writer.add("a", "mp4", b"", sample_metadata(frames))
    with pytest.raises(ValueError, match=r"'a\.b' may hold only"):
        writer.add("a.b", "mp4", b"", sample_metadata(frames))
    with pytest.raises(ValueError, match="samples_per_shard is 0: it must be at least 1"):
        ShardWriter(tmp_path, samples_per_shard=0)


def test_overwrite_removes_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1])
    with pytest.raises(ValueError, match="already holds shards"):
        ShardWriter(tmp_path)
    ShardWriter(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_additional_members_are_written(tmp_path: Path) -> None:
    frames = moving_square(2)
    writer = ShardWriter(tmp_path)
    writer.add(
        "a", "mp4", b"pixels", sample_metadata(frames), extra_members={"latents.safetensors": b"latents"}
    )
    writer.add("b", "mp4", b"pixels", sample_metadata(frames))
    writer.close()
    index = Index.load(tmp_path)
    assert [list(sample.members) for sample in index.samples()] == [
        ["json", "mp4", "latents.safetensors"],
        ["json", "mp4"],
    ]
    assert index.read(index.sample(0), "latents.safetensors") == b"latents"


def test_resumed_writer_adopts_complete_shards(tmp_path: Path) -> None:
    whole = files(write_shards(tmp_path / "whole", [3, 2, 1]))
    cut_off = write_shards(tmp_path / "cut_off", [3, 2, 1])
    (cut_off / "index.jsonl").unlink()
    (cut_off / "shard-00001.tar").write_bytes(whole["shard-00001.tar"][:1500])
    (cut_off / "shard-00002.tar").unlink()
    (cut_off / "shard-00002.tar.part").write_bytes(b"half")

    writer = ShardWriter(cut_off, samples_per_shard=3, resume=True)
    assert not writer.adopt_shard(2), "another number of samples"
    assert writer.adopt_shard(3)
    assert not writer.adopt_shard(2), "cut short"
    with pytest.raises(ValueError, match="two samples have the id s0001"):
        writer.add("s0001", "mp4", b"", sample_metadata(moving_square(2)))
    source = Index.load(tmp_path / "whole")
    for number in (3, 4):
        sample = source.sample(number)
        contents = {member: source.read(sample, member) for member in sample.members}
        writer.add(sample.id, "mp4", contents["mp4"], json.loads(contents["json"]))
    writer.end_shard()
    assert not writer.adopt_shard(1), "missing"
    sample = source.sample(5)
    writer.add(sample.id, "mp4", source.read(sample, "mp4"), json.loads(source.read(sample, "json")))
    writer.close()
    assert files(cut_off) == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_annotation_is_not_written(tmp_path: Path, value: float) -> None:
    writer = ShardWriter(tmp_path)
    frames = moving_square(2, 32, 48)
    with pytest.raises(ValueError, match="sample s0 cannot be written"):
        writer.add("s0", "mp4", b"", sample_metadata(frames, annotations={"aesthetic": value}))
