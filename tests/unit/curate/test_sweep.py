"""Subset configs for comparing thresholds, with annotations that only some clips have."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from svd_ds.curate.sweep import write_subsets
from svd_ds.curate.table import write_parquet
from svd_ds.data.writer import ShardWriter
from tests.videos import encode, moving_square, sample_metadata


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    """Four clips; two have an aesthetic score, none has a text area."""
    writer, frames = ShardWriter(tmp_path / "shards"), moving_square(4)
    for number in range(4):
        more = {"annotations": {"aesthetic": 4.0 + number}} if number < 2 else {}
        writer.add(f"s{number}", "mp4", encode(frames), sample_metadata(frames, motion=0.1 * number, **more))
    writer.close()
    write_parquet([{"reason": None}] * 4, {"reason": pa.string()}, tmp_path / "clips.parquet")
    return tmp_path


def test_annotation_that_some_clips_lack_has_subsets_of_the_others(curated: Path) -> None:
    subsets, notes = write_subsets(curated)
    kept = {subset.name: subset.num_kept for subset in subsets}
    assert kept == {"none": 4, "motion-12.5": 3, "motion-25": 3, "motion-50": 2} | {
        f"aesthetic-{share}": 1 for share in ("12.5", "25", "50")
    }
    assert notes == [
        "text_area: no subsets, because no clip has it",
        "aesthetic: 2 of 4 clips lack it and are in none of its subsets",
        "clip_similarity: no subsets, because no clip has it",
    ]
    config = yaml.safe_load((curated / "thresholds/subset/aesthetic-50.yaml").read_text())
    assert config["data"]["where"] == ["aesthetic>=q50"]
