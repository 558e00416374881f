"""Conditions on the index: what they keep, and how a wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.data.config import DataConfig
from svd_ds.data.filters import satisfies
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from svd_ds.data.writer import ShardWriter
from tests.videos import about, encode, moving_square


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips: motion 0.0 to 0.7, text area 0.14 down to 0."""
    path = tmp_path_factory.mktemp("shards")
    frames = moving_square(4, 16, 16)
    writer = ShardWriter(path, 3)
    for i in range(8):
        told = about(frames, motion=i / 10, annotations={"text_area": 0.02 * (7 - i)})
        writer.add(f"s{i}", "mp4", encode(frames), told)
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
def test_what_is_kept(folder: Path, conditions: list[str], kept: str) -> None:
    index = Index.load(folder)
    wanted = satisfies(conditions, index)
    assert [sample.id for sample in index.samples() if wanted(sample)] == [f"s{digit}" for digit in kept]


def test_the_loader_reads_what_is_kept(folder: Path) -> None:
    data = DataConfig(str(folder), 2, 16, 16, num_workers=0, where=("motion>=q75",))
    loader = Loader(data, 0, 0, 1, 2, 2)
    assert (len(loader), loader.num_left_out) == (2, 6)
    assert set(next(iter(loader))[0].ids) == {"s6", "s7"}
    with pytest.raises(ValueError, match=r"none of the 8 samples in .* meets data\.where=\[motion>9\]"):
        Loader(DataConfig(str(folder), 2, 16, 16, where=("motion>9",)), 0, 0, 1, 2, 2)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("motion", "'motion', which is no condition"),
        ("motion=>1", "'motion=>1', which is no condition"),
        ("motion>=q125", "between q0 and q100"),
    ],
)
def test_a_wrong_condition_is_refused_with_the_config(condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(where=(condition,))


def test_an_annotation_that_every_sample_lacks_is_named(folder: Path) -> None:
    index = Index.load(folder)
    with pytest.raises(ValueError, match=r"beauty, which no sample in .* has; they have motion, .*text_area"):
        satisfies(["beauty>=q25"], index)
