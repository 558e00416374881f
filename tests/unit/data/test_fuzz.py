"""Random shards with random damage: the order is the same on any ranks, every intact sample is read once an
epoch, and a run that is killed and resumed elsewhere reads the same samples."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.loader import Loader
from svd_ds.data.writer import ShardWriter

ABOUT = {"captions": {"text": "x"}, "num_frames": 1, "fps": 1, "height": 8, "width": 8, "motion": 0}
BATCH = 36
WORLDS = st.sampled_from([1, 2, 3, 4])


def picture(number: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, 8, 3), number, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, sizes: list[int], broken: dict[int, str], mark: int = 0, low: int = 0) -> None:
    """Write shards in which some samples are cut short, not an image, or without captions.

    Sample k is grey of level mark + k, and every `low`-th one has half the height.
    """
    writer, number = ShardWriter(path, max(sizes)), 0
    for size in sizes:
        for _ in range(size):
            height = 4 if low and number % low == 0 else 8
            how, content = broken.get(number), picture(mark + number, height)
            metadata: dict[str, object] = {**ABOUT, "height": height}
            if how == "cut":
                content = content[:40]
            elif how == "junk":
                content = b"no picture"
            elif how == "mute":
                metadata = {**metadata, "captions": {}}
            writer.add(f"s{number}", "png", content, metadata)
            number += 1
        writer.end_shard()
    writer.close()


def read(config: DataConfig, world: int, micro: int, steps: int, start: Cursor | None) -> tuple[dict, Cursor]:
    """Read global steps on all ranks: sample ordinal -> (id, shape, pixel), and the cursor after them."""
    found, cursors = {}, set()
    for rank in range(world):
        loader, taken = Loader(config, 3, rank, world, BatchConfig(BATCH, micro), start), 0
        for batch, cursor in loader:
            clips = zip(batch.ids, batch.frames_BTCHW, strict=True)
            seen = [(name, tuple(clip.shape), int(clip[0, 0, 0, 0])) for name, clip in clips]
            found.update(zip(batch.ordinals, seen, strict=True))
            taken, end = taken + len(batch), cursor
            if taken == steps * BATCH // world:
                break
        cursors.add(end)
    assert len(cursors) == 1, "the cursor is the same on every rank"
    return found, cursors.pop()


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5).filter(lambda sizes: 5 < sum(sizes) <= 60),
    broken=st.dictionaries(st.integers(0, 59), st.sampled_from(["cut", "junk", "mute"]), max_size=4),
    worlds=st.tuples(WORLDS, WORLDS),
    micros=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    buckets=st.sampled_from([{}, {"1x8x8": 3, "1x4x8": 1}]),
    cut=st.integers(1, 3),
)
@settings(max_examples=10, deadline=None)
def test_order_is_exact_for_any_shards_ranks_and_damage(
    sizes: list[int],
    broken: dict[int, str],
    worlds: tuple[int, int],
    micros: tuple[int, int],
    buckets: dict[str, int],
    cut: int,
) -> None:
    total = sum(sizes)
    bad = {f"s{number}" for number in broken if number < total}
    with TemporaryDirectory() as folder:
        write(Path(folder), sizes, broken, low=3 if buckets else 0)
        config = DataConfig(
            folder, 1, 8, 8, fps=0, crop="center", max_quarantined=1.0, num_workers=0, buckets=buckets
        )
        steps = max(4, -(-2 * total // BATCH))
        whole, end = read(config, 1, 3, steps, None)
        first, middle = read(config, worlds[0], micros[0], cut, None)
        rest, after = read(config, worlds[1], micros[1], steps - cut, middle)
    assert sorted(whole) == list(range(steps * BATCH)), "every ordinal once"
    assert first | rest == whole and not first.keys() & rest.keys() and after == end
    times = Counter(name for name, *_ in whole.values())
    assert not bad & times.keys(), "unreadable samples are replaced"
    low = {f"s{number}" for number in range(0, total, 3)} if buckets else set()
    for members in (low, {f"s{number}" for number in range(total)} - low):
        turns = [times[name] for name in members - bad]
        clips = sum(turns)
        assert all(count >= clips // max(1, len(members)) for count in turns), "each is read as often"
        assert bad or not turns or max(turns) - min(turns) <= 1


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=3)


@given(SIZES, SIZES)
@settings(max_examples=4, deadline=None)
def test_mixture_is_exact_in_each_of_its_sets(ours: list[int], theirs: list[int]) -> None:
    with TemporaryDirectory() as folder:
        sets = {f"{folder}/a": 3.0, f"{folder}/b": 1.0}
        for path, sizes, mark in zip(sets, (ours, theirs), (0, 100), strict=True):
            write(Path(path), sizes, {}, mark)
        config = DataConfig("unused", 1, 8, 8, fps=0, crop="center", num_workers=0, mixture=sets)
        whole, _ = read(config, 1, 3, 4, None)
        first, middle = read(config, 2, 1, 1, None)
        rest, _ = read(config, 3, 2, 3, middle)
    assert first | rest == whole
    times = Counter(pixel for _, _, pixel in whole.values())
    for sizes, mark, share in ((ours, 0, 0.75), (theirs, 100, 0.25)):
        counts = [times[mark + number] for number in range(sum(sizes))]
        assert max(counts) - min(counts) <= 1, "each sample once an epoch of its own set"
        assert abs(sum(counts) - share * 4 * BATCH) <= 2
