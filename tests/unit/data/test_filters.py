"""Conditions on the index: the samples that they select, and errors of wrong ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_ds.curate.select import ClipRecord, apply_conditions
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.filters import Condition, select_samples
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from svd_ds.data.writer import ShardWriter
from tests.videos import encode, moving_square, sample_metadata

CLIP = ClipRecord(
    id="a",
    video="a.mp4",
    start_frame=0,
    end_frame=9,
    fps=24.0,
    height=16,
    width=16,
    method="encoded",
    media="a.mp4",
    motion=0.1,
    annotations={},
    captions={},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight clips with motion 0.0 to 0.7 and text area 0.14 down to 0."""
    path = tmp_path_factory.mktemp("shards")
    frames = moving_square(4, 16, 16)
    writer = ShardWriter(path, 3)
    for i in range(8):
        metadata = sample_metadata(frames, motion=i / 10, annotations={"text_area": 0.02 * (7 - i)})
        writer.add(f"s{i}", "mp4", encode(frames), metadata)
    writer.close()
    return path


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["motion>=q25"], "234567"),
        (["motion>q50"], "4567"),
        (["text_area<=0.07"], "4567"),
        (["text_area<0.08", "motion <= 0.5"], "45"),
        (["motion>=q0"], "01234567"),
        (["motion>=q25", "text_area<=q75"], "234567"),
    ],
)
def test_conditions_select_samples(folder: Path, conditions: list[str], kept: str) -> None:
    index = Index.load(folder)
    wanted = select_samples(conditions, index)
    assert [sample.id for sample in index.samples() if wanted(sample)] == [f"s{digit}" for digit in kept]


def test_loader_reads_selected_samples(folder: Path) -> None:
    data = DataConfig(str(folder), 2, 16, 16, num_workers=0, where=("motion>=q75",))
    loader = Loader(data, 0, 0, 1, BatchConfig(2))
    assert (len(loader), loader.num_left_out) == (2, 6)
    assert set(next(iter(loader))[0].ids) == {"s6", "s7"}
    with pytest.raises(ValueError, match=r"none of the 8 samples in .* meets data\.where=\[motion>9\]"):
        Loader(DataConfig(str(folder), 2, 16, 16, where=("motion>9",)), 0, 0, 1, BatchConfig(2))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("motion", "'motion', which is not a condition"),
        ("motion=>1", "'motion=>1', which is not a condition"),
        ("motion>=q125", "between q0 and q100"),
    ],
)
def test_wrong_condition_is_refused(condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(where=(condition,))


def test_annotation_that_every_sample_lacks_is_named(folder: Path) -> None:
    index = Index.load(folder)
    with pytest.raises(
        ValueError, match=r"beauty, which no sample in .* has; the samples have motion, .*area"
    ):
        select_samples(["beauty>=q25"], index)


def test_samples_without_the_number_are_left_out_and_counted(tmp_path: Path) -> None:
    frames, writer = moving_square(4, 16, 16), ShardWriter(tmp_path)
    values = [1.0, float("nan"), None, True, "4", 2.0, float("inf"), 3.0]
    for number in range(len(values)):
        writer.add(f"s{number}", "mp4", encode(frames), sample_metadata(frames, annotations={"a": 0.0}))
    writer.close()
    # Earlier versions wrote such values; the writer no longer does.
    index = tmp_path / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    for row, value in zip(rows[1:], values, strict=True):
        row["annotations"] = {"a": value}
    index.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = DataConfig(str(tmp_path), 2, 16, 16, num_workers=0, where=("a>=q50",))
    loader = Loader(data, 0, 0, 1, BatchConfig(2))
    assert set(next(iter(loader))[0].ids) == {"s5", "s7"}, "the quantile is that of 1, 2 and 3"
    assert loader.notes == [f"5 of 8 samples in {tmp_path} lack a and are left out"]
    assert not Loader(replace(data, where=("motion>=q0",)), 0, 0, 1, BatchConfig(2)).notes


@given(
    numbers=st.lists(st.none() | st.floats(-9, 9) | st.just(float("nan")), min_size=1, max_size=12),
    condition=st.sampled_from(["a>=q25", "a<q75", "a>1", "a<=-1"]),
)
@settings(max_examples=50, deadline=None)
def test_curation_and_training_select_the_same_samples(numbers: list[float | None], condition: str) -> None:
    """curate.py and data.where select the same samples by the same numbers."""
    parsed = Condition.parse(condition)
    clips = [replace(CLIP, id=str(number), annotations={"a": value}) for number, value in enumerate(numbers)]
    limit = parsed.limit(numbers)
    if limit is None:
        with pytest.raises(ValueError, match="asks for a, which no clip has"):
            apply_conditions(clips, [parsed])
        return
    apply_conditions(clips, [parsed])
    assert [clip.reason is None for clip in clips] == [parsed.accepts(value, limit) for value in numbers]


def test_condition_with_non_finite_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.where has 'motion>1e999', whose number is not finite"):
        DataConfig(where=("motion>1e999",))
