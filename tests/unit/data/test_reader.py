"""A reader makes a clip of any sample or reports a fault, once, and at bounded cost."""

from __future__ import annotations

import io
import json
import resource
import struct
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svd_ds.data import latents, reader
from svd_ds.data.batching import BatchConfig
from svd_ds.data.clips import read_frames
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from svd_ds.data.writer import ShardWriter
from svd_ds.pixels.still import MAX_PIXELS
from tests.unit.data.test_fuzz import ABOUT, picture, write
from tests.videos import encode, moving_square, sample_metadata


def loader_of(folder: Path, batch: int = 4, **changes: Any) -> Loader:
    settings = {"crop": "center", "num_workers": 0, "max_quarantined": 0.5, **changes}
    return Loader(DataConfig(str(folder), 1, 8, 8, **settings), 0, 0, 1, BatchConfig(batch))


def ids(loader: Loader, batches: int = 3) -> set[str]:
    return {name for batch, _ in islice(loader, batches) for name in batch.ids}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(height: int, width: int, rows: int = 1) -> bytes:
    """Make a PNG of a few hundred bytes that claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (3 * width + 1) * rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(content)


BOMBS = {
    "png": png_bomb(16000, 16000),
    "jpg": jpeg_bomb(16000, 16000),
    "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0" * 9,
    "png of 50000": png_bomb(50000, 50000, 0),
    "png that is too large for its index": png_bomb(4000, 4000),
    "jpg that is too large for its index": jpeg_bomb(4000, 4000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_image_claiming_more_pixels_than_its_index_is_not_decoded(tmp_path: Path, kind: str) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("bomb", kind[:4].strip(), BOMBS[kind], ABOUT)
    for number in range(3):
        writer.add(f"s{number}", "png", picture(number, 8), ABOUT)
    writer.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = loader_of(tmp_path)
    assert ids(loader) == {"s0", "s1", "s2"}
    cause = loader.pop_faults()[0].cause
    assert "is not decoded" in cause or "cannot be decoded" in cause
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000, "kB: nothing was allocated"


def test_pixel_limit_error_has_both_numbers() -> None:
    with pytest.raises(ValueError, match=rf"^the file claims 9500 x 9500 pixels, but at most {MAX_PIXELS}"):
        read_frames(png_bomb(9500, 9500), [0], (8, 8))
    with pytest.raises(
        ValueError, match=r"^the file claims 16 x 16 pixels, but at most 64 are allowed: it is not"
    ):
        read_frames(encode(moving_square(2, 16, 16)), [0], (8, 8), max_pixels=64)
    assert read_frames(picture(3, 8), [0], (8, 8), max_pixels=64).shape == (1, 3, 8, 8)


def test_frames_smaller_than_the_index_says_are_not_enlarged(tmp_path: Path) -> None:
    frames, writer = moving_square(2, 8, 8), ShardWriter(tmp_path)
    large = moving_square(2, 32, 32)
    writer.add("small", "mp4", encode(frames), sample_metadata(large))
    writer.add("large", "mp4", encode(large), sample_metadata(large))
    writer.close()
    loader = Loader(
        DataConfig(str(tmp_path), 2, 16, 16, num_workers=0, max_quarantined=0.5), 0, 0, 1, BatchConfig(2)
    )
    assert ids(loader) == {"large"}
    assert loader.pop_faults()[0].cause == "its frames have 8 x 8 pixels, and do not cover 16 x 16"


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), KeyError("odd"), SyntaxError("odd"), RecursionError("odd")]
)
@pytest.mark.parametrize("where", ["read_captions", "read_frames"])
def test_any_exception_of_a_sample_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    write(tmp_path, [4], {})
    real = getattr(reader, where)

    def fails_once(*arguments: Any) -> Any:
        if fails_once.left:
            fails_once.left -= 1
            raise error
        return real(*arguments)

    fails_once.left = 1
    monkeypatch.setattr(reader, where, fails_once)
    loader = loader_of(tmp_path)
    assert len(ids(loader, 1)) == 3
    faults = loader.pop_faults()
    assert [fault.cause for fault in faults] == [f"{type(error).__name__}: {error}"] and not faults[
        0
    ].is_retryable


@pytest.mark.parametrize("error", [MemoryError(), AssertionError("a bug")])
def test_assertions_and_out_of_memory_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write(tmp_path, [4], {})

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(reader, "read_frames", fails)
    with pytest.raises(type(error)):
        next(iter(loader_of(tmp_path)))


def test_damaged_sample_is_read_once_and_unreachable_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [4], {1: "junk"})
    tried: list[str] = []
    real, away = Index.open, {"s2"}

    def counted(index: Index, sample: Any) -> Any:
        tried.append(sample.id)
        if sample.id in away:
            raise OSError(116, "stale file handle")
        return real(index, sample)

    monkeypatch.setattr(Index, "open", counted)
    batches = iter(loader_of(tmp_path))
    for _ in range(5):
        next(batches)
    assert tried.count("s1") == 1 and tried.count("s2") > 3
    away.clear()
    assert "s2" in {name for batch, _ in islice(batches, 2) for name in batch.ids}


@pytest.mark.parametrize("json_of", ['{"captions": %s}', '{"caption": %s}', "%s"])
@pytest.mark.parametrize(
    "value",
    [
        "null",
        "5",
        "[]",
        '"\\ud83d"',
        '{"a": null}',
        '{"a": "\\ud83d"}',
        "[" * 5000,
        "NaN",
        '{"\\ud83d": "x"}',
    ],
)
def test_captions_of_any_type_are_texts_or_a_fault(tmp_path: Path, json_of: str, value: str) -> None:
    writer = ShardWriter(tmp_path)
    for number in range(4):
        writer.add(f"s{number}", "png", picture(number, 8), ABOUT)
    writer.close()
    index = Index.load(tmp_path)
    offset, size = index.sample(1).members["json"]
    text = (json_of % value).encode()
    rows = (tmp_path / "index.jsonl").read_text().splitlines()
    if len(text) > size:
        # The json's block in the tar has room for 512 bytes; a deeper one is cut, and so no JSON either.
        text = text[:512]
    row = json.loads(rows[2])
    row["members"]["json"] = [offset, len(text)]
    (tmp_path / "index.jsonl").write_text("\n".join([*rows[:2], json.dumps(row), *rows[3:]]) + "\n")
    with open(tmp_path / index.shards[0].name, "r+b") as file:
        file.seek(offset)
        file.write(text)
    loader = loader_of(tmp_path)
    for batch, _ in islice(loader, 3):
        for caption in batch.captions:
            assert isinstance(caption, str)
            assert not any("\ud800" <= letter <= "\udfff" for letter in caption), "it can be encoded as UTF-8"
    assert all("\n" not in fault.cause for fault in loader.pop_faults())


ORIGIN = latents.LatentsOrigin(8, 8, "0123456789ab")


def latents_of(level: float, frames: np.ndarray | None = None) -> bytes:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8) if frames is None else torch.from_numpy(frames)
    content = latents.pack(torch.full((1, 8, 1, 1), 7.0), pixels, ORIGIN)
    return content.replace(
        torch.full((8,), 7.0).half().numpy().tobytes(), np.full(8, level, np.float16).tobytes()
    )


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf, 65504, -2000])
def test_implausible_latents_are_not_batched(tmp_path: Path, level: float) -> None:
    writer = ShardWriter(tmp_path)
    for number in range(4):
        content = latents_of(level if number == 1 else 3.0)
        writer.add(f"s{number}", "png", picture(number, 8), ABOUT, {latents.MEMBER: content})
    writer.close()
    loader = loader_of(tmp_path, latents=True)
    batches = [batch for batch, _ in islice(loader, 3)]
    assert {name for batch in batches for name in batch.ids} == {"s0", "s2", "s3"}
    for batch in batches:
        assert batch.moments_BTMhw is not None and (batch.moments_BTMhw == 3).all()
    faults = loader.pop_faults()
    assert {fault.id for fault in faults} == {"s1"} and all("finite" in fault.cause for fault in faults)


def test_cached_frame_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    for number in range(4):
        frames = np.zeros((1, 3, 64, 64), np.uint8) if number == 2 else None
        content = latents_of(3.0, frames)
        writer.add(f"s{number}", "png", picture(number, 8), ABOUT, {latents.MEMBER: content})
    writer.close()
    loader = loader_of(tmp_path, latents=True)
    assert ids(loader) == {"s0", "s1", "s3"}
    assert "frame 0 has 64 x 64 pixels" in loader.pop_faults()[0].cause


def test_latents_of_another_shape_do_not_end_the_run(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    for number in range(4):
        moments = torch.zeros((1, 8, 2, 1) if number == 2 else (1, 8, 1, 1))
        content = latents.pack(moments, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ORIGIN)
        writer.add(f"s{number}", "png", picture(number, 8), ABOUT, {latents.MEMBER: content})
    writer.close()
    loader = loader_of(tmp_path, latents=True)
    assert ids(loader) == {"s0", "s1", "s3"}
    cause = "its latents have shape (8, 2, 1), but the first sample's have (8, 1, 1)"
    assert {fault.cause for fault in loader.pop_faults()} == {cause}
