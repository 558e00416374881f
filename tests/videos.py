"""Small videos and shards for tests, with shapes that move at a known speed."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np

from svd_ds.data.writer import ShardWriter


def moving_square(
    num_frames: int, height: int = 48, width: int = 64, speed: float = 2.0, seed: int = 0
) -> np.ndarray:
    """Make frames of a textured square that moves `speed` pixels a frame to the right: uint8, (T, H, W,
    3)."""
    generator = np.random.default_rng(seed)
    side = height // 2
    texture = generator.integers(0, 256, (side // 4, side // 4, 3)).repeat(4, 0).repeat(4, 1)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    frames[:] = generator.integers(60, 200, 3)
    top, left = (height - side) // 2, int(generator.integers(0, width))
    for number in range(num_frames):
        columns = (left + round(speed * number) + np.arange(texture.shape[1])) % width
        frames[number, top : top + texture.shape[0], columns] = texture.transpose(1, 0, 2)
    return frames


def counting(num_frames: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Make frames of flat grey, uint8, (T, H, W, 3): frame k has level 4 k + 8, which gives its number."""
    levels = (np.arange(num_frames) * 4 + 8).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def encode(
    frames_THWC: np.ndarray,
    fps: int = 24,
    keyframe_every: int = 8,
    suffix: str = "mp4",
    muxing: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Encode frames as a video file with B-frames, the default of encoders."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=suffix, options=muxing or {}) as container:
        given = {"crf": "12", "g": str(keyframe_every), "mbtree": "0"} | (options or {})
        stream = container.add_stream("libx264", rate=fps, options=given)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def hide(content: bytes, first: int, num_frames: int, fps: int = 24) -> bytes:
    """Edit an mp4 or mov so that its edit list shows `num_frames` frames from frame `first` on."""
    elst_at = content.index(b"elst") + 4
    entry = bytearray(content)
    ticks = int.from_bytes(content[(head := content.index(b"mdhd") + 16) : head + 4], "big")
    scale_at = content.index(b"mvhd") + 16
    scale = int.from_bytes(content[scale_at : scale_at + 4], "big")
    start = int.from_bytes(content[elst_at + 12 : elst_at + 16], "big")
    entry[elst_at + 8 : elst_at + 12] = (num_frames * scale // fps).to_bytes(4, "big")
    entry[elst_at + 12 : elst_at + 16] = (start + first * ticks // fps).to_bytes(4, "big")
    return bytes(entry)


def write_video(path: Path, frames_THWC: np.ndarray, fps: int = 24) -> Path:
    """Encode frames to a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(frames_THWC, fps))
    return path


def sample_metadata(
    frames_THWC: np.ndarray, fps: float = 24.0, motion: float = 0.1, **more: object
) -> dict[str, object]:
    """Make the content of a sample's JSON."""
    num_frames, height, width = frames_THWC.shape[:3]
    return {
        "captions": {"text": "a square moves"},
        "num_frames": num_frames,
        "fps": fps,
        "height": height,
        "width": width,
        "motion": motion,
        **more,
    }


def write_shards(folder: Path, shard_sizes: list[int], num_frames: int = 6) -> Path:
    """Write shards of the given sizes, with samples s0000, s0001, ... that all have the same frames."""
    frames = moving_square(num_frames, height=32, width=48)
    content = encode(frames)
    writer = ShardWriter(folder, samples_per_shard=max(shard_sizes))
    number = 0
    for size in shard_sizes:
        for _ in range(size):
            writer.add(f"s{number:04d}", "mp4", content, sample_metadata(frames, motion=0.01 * (number + 1)))
            number += 1
        writer.end_shard()
    writer.close()
    return folder
