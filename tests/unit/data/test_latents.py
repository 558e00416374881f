"""Cached latents: their file, and a loader that reads them instead of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from svd_ds.data.batching import BatchConfig
from svd_ds.data.cached_tensors import TensorFile
from svd_ds.data.config import DataConfig
from svd_ds.data.latents import MEMBER, LatentsOrigin, pack, read_frames, read_moments, read_origin
from svd_ds.data.loader import Loader
from svd_ds.data.writer import ShardWriter
from tests.videos import counting, encode, sample_metadata

ORIGIN = LatentsOrigin(height=16, width=24, autoencoder="0123456789ab")
NUM_STORED = 12
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def numbered(num_frames: int = NUM_STORED) -> torch.Tensor:
    """Moments whose values are the number of their frame."""
    return torch.arange(num_frames).float()[:, None, None, None].expand(num_frames, 8, 2, 3)


def content_of(moments_TMhw: torch.Tensor, origin: LatentsOrigin = ORIGIN) -> bytes:
    """Pack moments with the frames of `counting`."""
    frames = counting(len(moments_TMhw), height=16, width=24)
    return pack(moments_TMhw, torch.from_numpy(frames).permute(0, 3, 1, 2), origin)


def opened(content: bytes) -> TensorFile:
    def read(begin: int, number: int) -> bytes:
        if begin + number > len(content):
            raise ValueError(f"{len(content)} bytes")
        return content[begin : begin + number]

    return TensorFile(read, MEMBER)


def test_file_has_the_moments_and_frames(tmp_path: Path) -> None:
    moments = torch.randn(5, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    content = content_of(moments)
    assert read_origin(opened(content)) == ORIGIN
    for rows in (range(1, 5, 3), range(2, 5), range(4, 5)):
        assert torch.equal(read_moments(opened(content), rows), moments[list(rows)].half())
    levels = read_frames(opened(content), [0, 3]).float()
    assert levels.shape == (2, 3, 16, 24) and levels.mean((1, 2, 3)).tolist() == pytest.approx([8, 20], abs=1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"moments", "frames", "frame_ends"}
        assert file.get_tensor("moments").shape == (5, 8, 2, 3)
        origin = '{"height": 16, "width": 24, "autoencoder": "0123456789ab"}'
        assert file.metadata() == {"origin": origin}


def test_moments_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite in float16"):
        content_of(numbered() + 7e4)


@pytest.mark.parametrize("content", [b"", b"no safetensors", content_of(numbered())[:20]])
def test_other_and_damaged_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="has no valid origin"):
        opened(content)


def test_too_few_frames_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 12 rows of moments, but row 12 is needed"):
        read_moments(opened(content_of(numbered())), [0, 12])


def write(folder: Path, latents: Mapping[str, bytes | None]) -> DataConfig:
    """Write samples with these latents, and a small one without; returns the config that reads them."""
    frames, small = counting(NUM_STORED, height=32, width=48), counting(NUM_STORED, height=8, width=12)
    writer = ShardWriter(folder)
    writer.add("small", "mp4", encode(small), sample_metadata(small))
    for name, content in latents.items():
        more = {} if content is None else {MEMBER: content}
        writer.add(name, "mp4", encode(frames), sample_metadata(frames), more)
    writer.close()
    return DataConfig(
        str(folder), 3, 16, 24, fps=8, crop="center", latents=True, max_quarantined=0.0, num_workers=0
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_are_the_same_with_and_without_the_cache(tmp_path: Path, num_workers: int) -> None:
    config = write(tmp_path, {name: content_of(numbered()) for name in "abc"})
    config = replace(config, num_workers=num_workers)
    cached = Loader(config, 0, 0, 1, BatchConfig(4))
    decoded = Loader(replace(config, latents=False), 0, 0, 1, BatchConfig(4))
    assert cached.sources[0].latents_origin == ORIGIN and len(cached) == len(decoded) == 3
    starts = set()
    for (here, _), (there, _) in zip(islice(cached, 4), islice(decoded, 4), strict=True):
        assert (here.ids, here.ordinals, here.captions) == (there.ids, there.ordinals, there.captions)
        assert torch.equal(here.scalars_B["fps"], there.scalars_B["fps"])
        assert here.num_frames == there.num_frames == 3
        assert there.moments_BTMhw is None and there.frames_BTCHW.shape[1] == 3
        assert here.frames_BTCHW.shape[1] == 1, "the first frame's pixels alone"
        torch.testing.assert_close(here.frames_BTCHW, there.frames_BTCHW[:, :1], atol=2, rtol=0)
        assert here.moments_BTMhw is not None and here.moments_BTMhw.shape == (4, 3, 8, 2, 3)
        assert here.moments_BTMhw.dtype == torch.float16
        # Frame k of `counting` is grey of level 4 k + 8.
        numbers = ((there.frames_BTCHW.float().mean((2, 3, 4)) - 8) / 4).round()
        assert torch.equal(here.moments_BTMhw[:, :, 0, 0, 0].float(), numbers)
        starts |= set(numbers[:, 0].tolist())
    assert len(starts) > 2, "starts differ"


def test_batch_keeps_its_moments(tmp_path: Path) -> None:
    batch, _ = next(iter(Loader(write(tmp_path, {"a": content_of(numbered())}), 0, 0, 1, BatchConfig(3))))
    assert batch.moments_BTMhw is not None
    chosen = batch.select([2, 0]).to(torch.device("cpu"))
    assert chosen.moments_BTMhw is not None and chosen.num_frames == 3
    assert torch.equal(chosen.moments_BTMhw, batch.moments_BTMhw[[2, 0]])


def test_first_sample_without_latents_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, {"a": content_of(numbered()), "b": None, "c": None})
    with pytest.raises(ValueError, match=r"^sample b in .* has no latents; tools/encode\.py adds them$"):
        Loader(config, 0, 0, 1, BatchConfig(1))


def test_latents_of_another_size_are_refused_with_both_sizes(tmp_path: Path) -> None:
    config = write(tmp_path, {"a": content_of(numbered())})
    with pytest.raises(ValueError, match=r"are of 16 x 24 pixels, but data\.height x data\.width is 24 x 16"):
        Loader(replace(config, height=24, width=16), 0, 0, 1, BatchConfig(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (content_of(numbered(), replace(ORIGIN, autoencoder="ba9876543210")), "ba9876543210.*0123456789ab"),
        (content_of(numbered(), replace(ORIGIN, height=8)), "height=8.*height=16"),
        (content_of(numbered(5)), "has 5 rows of moments"),
        (content_of(numbered())[:-4], "damaged"),
    ],
)
def test_sample_with_mismatched_latents_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    config = write(tmp_path, {"a": content_of(numbered()), "b": content})
    with pytest.raises(ValueError, match=f"^sample b of .*shard-00000.tar cannot be read: its .*{message}"):
        list(islice(Loader(replace(config, num_frames=NUM_STORED), 0, 0, 1, BatchConfig(1)), 2))


def test_first_sample_of_unknown_origin_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sample a in .* its latents\.safetensors has no valid origin"):
        Loader(write(tmp_path, {"a": b"no safetensors"}), 0, 0, 1, BatchConfig(1))


@pytest.mark.parametrize("changes", [{"crop": "random"}, {"crop": "center", "flip": True}])
def test_crop_that_latents_do_not_have_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"cached latents need data\.crop=center and data\.flip=false"):
        replace(DataConfig(crop="center", latents=True), **changes)
