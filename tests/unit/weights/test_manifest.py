"""The manifest COMPLETE detects damage of the checkpoint and of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svd_ds.weights import manifest
from svd_ds.weights.manifest import (
    COMPLETE,
    FileDigest,
    Manifest,
    check_checkpoint,
    find_damage,
    read_manifest,
)
from svd_ds.weights.shards import WeightShards
from tests.networks import seal


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path / "step-0000001"
    (folder / "unet").mkdir(parents=True)
    for rank in range(2):
        file = folder / f"unet/rank-{rank:05d}-of-00002.safetensors"
        save_file({"a": torch.full((2,), float(rank))}, file)
    (folder / "state.json").write_text("{}\n")
    seal(folder, world_size=2)
    return folder


def test_intact_checkpoint_has_no_damage(checkpoint: Path) -> None:
    check_checkpoint(checkpoint)
    assert read_manifest(checkpoint).world_size == 2
    assert WeightShards(checkpoint / "unet").read("a", 4, 1, 3).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["../other/state.json", "/etc/hostname", "unet/../../x", "", "."])
def test_file_outside_the_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    listed = {name: FileDigest(3, "0" * 32)}
    (checkpoint / COMPLETE).write_text(Manifest("", 2, True, listed).as_json())
    with pytest.raises(ValueError, match=r"COMPLETE is damaged: .* is not inside the checkpoint"):
        read_manifest(checkpoint)


def test_manifest_of_another_version_is_not_called_damaged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 7)
        seal(checkpoint)
    with pytest.raises(
        ValueError, match=r"COMPLETE has the format 7 of another version of svd_ds, and .* 1$"
    ):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", ["5f0c12abc", "[]", "null", "{}", '{"xxh3_128": 1}'])
def test_invalid_manifest_is_named_as_damaged(checkpoint: Path, content: str) -> None:
    (checkpoint / COMPLETE).write_text(content)
    with pytest.raises(ValueError, match="step-0000001/COMPLETE is damaged"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("key", ["token", "world_size", "proven", "files"])
def test_changed_value_is_damage(checkpoint: Path, key: str) -> None:
    values = json.loads((checkpoint / COMPLETE).read_text())
    values[key] = {} if key == "files" else 3
    (checkpoint / COMPLETE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="its own checksum differs"):
        read_manifest(checkpoint)


def test_files_of_another_number_of_ranks_are_not_read(checkpoint: Path) -> None:
    """Such files exist if one checkpoint was copied over another."""
    for rank in range(3):
        save_file({"a": torch.full((2,), 9.0)}, checkpoint / f"unet/rank-{rank:05d}-of-00003.safetensors")
    check_checkpoint(checkpoint)
    assert WeightShards(checkpoint / "unet").read("a", 4, 0, 4).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_manifest_without_one_ranks_file_gives_no_weights(checkpoint: Path) -> None:
    """Each file has the right checksum, and one was never listed."""
    (checkpoint / "unet/rank-00001-of-00002.safetensors").unlink()
    seal(checkpoint, world_size=2)
    with pytest.raises(ValueError, match="unet has the files of 1 ranks out of 2"):
        WeightShards(checkpoint / "unet")


def test_file_that_became_a_folder_or_a_dead_link_is_damage(checkpoint: Path) -> None:
    state = checkpoint / "state.json"
    state.unlink()
    state.symlink_to(checkpoint / "nothing")
    assert find_damage(checkpoint, read_manifest(checkpoint)) == "state.json is missing"
    state.unlink()
    state.mkdir()
    found = find_damage(checkpoint, read_manifest(checkpoint))
    assert found is not None and found.startswith("state.json ")
