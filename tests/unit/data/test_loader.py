"""The loader: the same order for any number of ranks and workers, exact resume, errors in one sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from svd_ds.batch import Batch
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.loader import Loader
from svd_ds.data.order import Order
from svd_ds.data.shards import Index
from svd_ds.data.writer import ShardWriter
from tests.videos import counting, encode, moving_square, sample_metadata, write_shards

SHARD_SIZES = [1, 50, 3, 2, 17, 1, 9, 5, 4, 8]
TOTAL = sum(SHARD_SIZES)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), SHARD_SIZES)


def config(folder: Path, **changes: object) -> DataConfig:
    small = DataConfig(str(folder), 2, 16, 16, fps=0, max_quarantined=0.0, num_workers=0)
    return replace(small, **changes)


def read(
    data: DataConfig,
    world: int,
    num_steps: int,
    global_batch: int,
    cursor: Cursor | None = None,
    micro_batch: int = 1,
) -> tuple[dict[int, tuple[str, float]], Cursor]:
    """Read global steps on all ranks: sample ordinal -> (id, mean of its pixels), and the cursor after
    them."""
    found: dict[int, tuple[str, float]] = {}
    cursors = set()
    for rank in range(world):
        loader = Loader(data, 5, rank, world, BatchConfig(global_batch, micro_batch), cursor)
        batches = list(islice(loader, num_steps * global_batch // world // micro_batch))
        for batch, _ in batches:
            means = batch.frames_BTCHW.float().mean((1, 2, 3, 4)).tolist()
            found.update(zip(batch.ordinals, zip(batch.ids, means, strict=True), strict=True))
        cursors.add(batches[-1][1])
    assert len(cursors) == 1, "the cursor is the same on every rank"
    return found, cursors.pop()


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_same_order_for_any_ranks_and_workers(shards: Path, world: int, num_workers: int) -> None:
    found, cursor = read(config(shards, num_workers=num_workers), world, num_steps=9, global_batch=12)
    assert cursor.next_ordinal == 108
    assert sorted(found) == list(range(108))
    order = Order(SHARD_SIZES, 5)
    names = [f"s{order.sample(ordinal):04d}" for ordinal in range(108)]
    assert [found[ordinal][0] for ordinal in range(108)] == names
    assert sorted(names[:TOTAL]) == [f"s{n:04d}" for n in range(TOTAL)], "every sample once an epoch"
    reference, _ = read(config(shards), 1, num_steps=9, global_batch=12, micro_batch=4)
    assert found == reference, "and the very same pixels"


@pytest.mark.parametrize("world", [2, 3])
def test_resume_at_other_ranks_and_workers_is_exact(shards: Path, world: int) -> None:
    whole, end = read(config(shards), 1, num_steps=12, global_batch=12)
    first, middle = read(config(shards, num_workers=2), 4, num_steps=5, global_batch=12)
    rest, after = read(config(shards, num_workers=1), world, num_steps=7, global_batch=12, cursor=middle)
    assert {**first, **rest} == whole and not first.keys() & rest.keys()
    assert after == end


def test_resume_with_another_batch_size_is_exact(shards: Path) -> None:
    whole, _ = read(config(shards), 1, num_steps=6, global_batch=10)
    first, middle = read(config(shards), 1, num_steps=2, global_batch=10)
    rest, _ = read(config(shards), 2, num_steps=5, global_batch=8, cursor=middle)
    assert {**first, **rest} == whole


def test_cursor_is_after_the_global_step(shards: Path) -> None:
    loader = Loader(config(shards), 0, 1, 2, BatchConfig(12, 2))
    assert [cursor.next_ordinal for _, cursor in islice(loader, 7)] == [12, 12, 12, 24, 24, 24, 36]


def test_batch_has_the_properties_of_its_samples(shards: Path) -> None:
    batch, _ = next(iter(Loader(config(shards, num_frames=3, width=24, fps=12), 0, 0, 1, BatchConfig(4))))
    assert isinstance(batch, Batch) and len(batch) == 4
    assert batch.frames_BTCHW.shape == (4, 3, 3, 16, 24) and batch.frames_BTCHW.dtype == torch.uint8
    assert batch.scalars_B["fps"].tolist() == [12.0] * 4 and batch.captions == ("a square moves",) * 4
    index = Index.load(shards)
    motion = {sample.id: sample.motion for sample in index.samples()}
    assert batch.scalars_B["motion_bucket"].tolist() == pytest.approx(
        [index.motion_map.bucket(motion[i]) for i in batch.ids]
    )


def test_elevation_comes_from_the_samples_that_have_it(tmp_path: Path) -> None:
    frames, writer = moving_square(2), ShardWriter(tmp_path)
    for name, camera in (("a", {"elevation": -5.0}), ("b", {})):
        writer.add(name, "mp4", encode(frames), sample_metadata(frames, **camera))
    writer.close()
    assert [sample.number("elevation") for sample in Index.load(tmp_path).samples()] == [-5.0, None]
    batch, _ = next(iter(Loader(config(tmp_path), 0, 0, 1, BatchConfig(2))))
    found = dict(zip(batch.ids, batch.scalars_B["elevation"].tolist(), strict=True))
    assert found["a"] == -5.0 and math.isnan(found["b"])


def test_crop_and_start_are_drawn(tmp_path: Path) -> None:
    frames = counting(20, height=32, width=64)
    frames[:, :, :32] = 0
    writer = ShardWriter(tmp_path)
    writer.add("a", "mp4", encode(frames), sample_metadata(frames))
    writer.close()

    def clips(**changes: object) -> torch.Tensor:
        loader = Loader(config(tmp_path, **changes), 0, 0, 1, BatchConfig(32))
        return next(iter(loader))[0].frames_BTCHW.float()

    centred = clips(crop="center")
    assert (centred[..., :6].mean((1, 2, 3, 4)) < 4).all() and (
        centred[..., -6:].mean((1, 2, 3, 4)) > 7
    ).all()
    assert len(set(centred.mean((1, 2, 3, 4)).tolist())) > 5, "starts differ"
    share_of_black = (clips(crop="random") < 4).float().mean((1, 2, 3, 4))
    assert share_of_black.min() < 0.3 and share_of_black.max() > 0.7, "crops differ"


@pytest.mark.parametrize(
    ("caption", "may_be"),
    [
        ("a bright square, leftover paint", True),
        ("on the Right, white", False),
        ("it moves leftwards", False),
        ("a right-handed player", False),
    ],
)
def test_half_of_the_clips_are_mirrored_unless_caption_names_sides(
    tmp_path: Path, caption: str, may_be: bool
) -> None:
    frames = np.zeros((2, 32, 64, 3), dtype=np.uint8)
    frames[:, :, 32:] = 200
    writer = ShardWriter(tmp_path)
    writer.add("a", "mp4", encode(frames), sample_metadata(frames, captions={"text": caption}))
    writer.close()
    data = config(tmp_path, crop="center", flip=True, height=16, width=32)
    batch, _ = next(iter(Loader(data, 0, 0, 1, BatchConfig(32))))
    mirrored = batch.frames_BTCHW[..., :8].float().mean((1, 2, 3, 4)) > 100
    assert 8 <= mirrored.sum() <= 24 if may_be else not mirrored.any()


def test_short_and_small_samples_are_left_out(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    for name, shape in {
        "good": (6, 32, 48),
        "short": (3, 32, 48),
        "small": (6, 12, 48),
        "narrow": (6, 48, 12),
    }.items():
        frames = moving_square(*shape)
        writer.add(name, "mp4", encode(frames), sample_metadata(frames))
    writer.close()
    loader = Loader(config(tmp_path, num_frames=6), 0, 0, 1, BatchConfig(2))
    assert len(loader) == 1 and loader.num_left_out == 3
    assert next(iter(loader))[0].ids == ("good", "good")
    with pytest.raises(
        ValueError, match=r"none of the 4 samples .* has 9 frames .* the longest has 6 frames"
    ):
        Loader(config(tmp_path, num_frames=9), 0, 0, 1, BatchConfig(2))


def test_share_of_the_clips_are_stills(shards: Path) -> None:
    videos, mixed = (
        next(iter(Loader(config(shards, num_frames=4, image_share=share), 5, 0, 1, BatchConfig(60))))[0]
        for share in (0.0, 0.3)
    )
    assert videos.still_B is None
    assert mixed.still_B is not None and 8 <= mixed.still_B.sum() <= 28
    assert mixed.ids == videos.ids and mixed.frames_BTCHW.shape == videos.frames_BTCHW.shape
    for row, still in enumerate(mixed.still_B):
        clip_TCHW = mixed.frames_BTCHW[row]
        assert bool(still) == bool((clip_TCHW == clip_TCHW[0]).all())
        assert bool(still) != torch.equal(clip_TCHW, videos.frames_BTCHW[row])


def test_images_are_read_as_stills_among_videos(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    for name, num_frames in {"video": 4, "image": 1}.items():
        frames = moving_square(num_frames, 32, 48)
        writer.add(name, "mp4", encode(frames), sample_metadata(frames))
    writer.close()
    assert len(Loader(config(tmp_path, num_frames=4), 0, 0, 1, BatchConfig(2))) == 1
    data = config(tmp_path, num_frames=4, image_share=1e-9)
    batch, _ = next(iter(Loader(data, 0, 0, 1, BatchConfig(2))))
    assert batch.still_B is not None
    assert dict(zip(batch.ids, batch.still_B.tolist(), strict=True)) == {"video": False, "image": True}


def test_batches_that_do_not_divide_are_refused(shards: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"batch.micro 4 does not divide the 5 clips that each of 2 ranks has .* choose 1 or 5",
    ):
        Loader(config(shards), 0, 0, 2, BatchConfig(10, 4))


def test_cursor_of_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    _, cursor = next(iter(Loader(config(shards), 0, 0, 1, BatchConfig(2))))
    other = write_shards(tmp_path, [4])
    with pytest.raises(ValueError, match="has read 2 samples of data with fingerprint"):
        Loader(config(other), 0, 0, 1, BatchConfig(2), cursor)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_sample_is_named_in_one_sentence(tmp_path: Path, num_workers: int) -> None:
    frames = moving_square(6, 32, 48)
    writer = ShardWriter(tmp_path)
    writer.add("good", "mp4", encode(frames), sample_metadata(frames))
    writer.add("bad", "mp4", b"no video at all", sample_metadata(frames))
    writer.close()
    loader = Loader(config(tmp_path, num_workers=num_workers), 0, 0, 1, BatchConfig(2))
    with pytest.raises(
        ValueError, match=r"^sample bad of .*shard-00000\.tar cannot be read: the file .*$"
    ) as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, r"data\.num_frames is 0: it must be at least 1"),
        ({"crop": "left"}, "'left': it must be one of random, center"),
        ({"num_workers": -1}, "num_workers is -1: it must be at least 0"),
        ({"image_share": 1.5}, "image_share is 1.5: it must be at least 0 and at most 1"),
        ({"caption_weights": {"coca": 0.0}}, "at least one must be above 0"),
    ],
)
def test_config_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DataConfig(), **changes)
