"""Reader: turns a sample of one data set into a clip of one shape.

The bytes of a sample are read within a time limit, then decoded. A latent cache (latents.py) gives the
clip's moments and the pixels of its conditioning frames; cached CLIP embeddings (clip_embeddings.py) give the
input of the cross-attention. Random choices are the same with and without these caches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from svd_ds.batch import Clip
from svd_ds.cli import USER_ERRORS, is_retryable
from svd_ds.data import clip_embeddings, latents
from svd_ds.data.cached_tensors import TensorFile
from svd_ds.data.clips import ClipDraws, Timing, choose_captioner, read_frames
from svd_ds.data.config import DataConfig, Shape
from svd_ds.data.members import ReadMember
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, is_out_of_memory
from svd_ds.data.read_timeout import with_timeout
from svd_ds.data.sample import Sample
from svd_ds.data.shards import Index
from svd_ds.data.sidecar import DEFAULT_CAPTIONER, decode_caption, parse_captions, parse_json
from svd_ds.data.sources import DatasetSource
from svd_ds.scalars import ClipProperties, clip_scalars

SIDES = re.compile(r"\b(left|right)(\b|ward|most|hand)", re.IGNORECASE)
"""Words of a caption that would be wrong for the mirrored clip."""
CODED_MARGIN = 128
"""Pixels by which a decoded frame may be higher and wider than its visible part."""
NO_FRAMES = torch.empty(0, 3, 0, 0, dtype=torch.uint8)


class UnreadableError(Exception):
    """A sample that cannot be read as a clip."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


@dataclass(frozen=True)
class Reader:
    """Reads the samples of one data set in one bucket."""

    config: DataConfig
    shape: Shape
    source: DatasetSource
    index: Index
    """Samples of the source in that bucket."""
    motion_map: MotionMap
    """Motion map of all the run's data sets together."""
    seed: int
    context: str | None
    """Kind of cached CLIP embeddings to read: image, ends or text; None reads none."""
    read_last_frame: bool
    """True if the last frame's pixels are read as well as the first's, next to latents."""

    def read(self, number: int, ordinal: int) -> Clip:
        """Read sample `number` as the clip at the sample ordinal `ordinal`.

        Raises:
            UnreadableError: the sample cannot be read.
            ReadTimeoutError: reading takes too long.
        """
        shard = self.index.shard_location(number)
        seconds = self.config.read_timeout_seconds
        hung = f"a read of {shard} has hung for data.read_timeout_seconds={seconds:g}"
        stored = with_timeout(lambda: self._read_stored(number, ordinal), seconds, hung)
        with _as_unreadable(stored.clip.id, shard):
            return stored.clip if stored.media is None else self._decode(stored, stored.media)

    def _read_stored(self, number: int, ordinal: int) -> _StoredClip:
        """Read the bytes of sample `number` from the file system."""
        shard = self.index.shard_location(number)
        with _as_unreadable(f"number {number}", shard, is_retryable):
            sample = self.index.sample(number)
        with _as_unreadable(sample.id, shard, is_retryable), self.index.open(sample) as read:
            return self._read_members(read, sample, ordinal)

    def _read_members(self, read: ReadMember, sample: Sample, ordinal: int) -> _StoredClip:
        """Choose the frames and the caption of a clip, and read the members of the sample that it needs."""
        config, draws = self.config, ClipDraws.draw(self.seed, ordinal)
        # In a run on videos, a single frame is a still: it takes the image path.
        still = config.num_frames > 1 and (
            sample.num_frames == 1 or self.shape.num_frames == 1 or draws.still < config.image_share
        )
        num_frames = 1 if still else self.shape.num_frames
        timing = Timing.choose(sample.num_frames, sample.fps, num_frames, config.fps, draws.start)
        wanted = timing.frame_numbers(num_frames)
        captions = read_captions(read, sample)
        captioner = choose_captioner(captions, config.caption_weights, draws.caption)
        media, moments, frames = None, None, NO_FRAMES
        if self.source.latents_origin is None:
            media = read(sample.media)
        else:
            file = TensorFile(partial(read, latents.MEMBER), latents.MEMBER)
            if (origin := latents.read_origin(file)) != (expected := self.source.latents_origin):
                raise ValueError(f"its latents are {origin}, but the first sample's are {expected}")
            _check_shape("latents", latents.moments_shape(file), self.source.latents_shape)
            conditioning = [wanted[0], wanted[-1]] if self.read_last_frame else [wanted[0]]
            moments, frames = latents.read_moments(file, wanted), latents.read_frames(file, conditioning)
        clip = Clip(
            id=sample.id,
            ordinal=ordinal,
            frames_TCHW=frames,
            caption=captions[captioner],
            scalars=clip_scalars(
                ClipProperties(
                    fps=timing.fps,
                    num_frames=num_frames,
                    motion_bucket=self.motion_map.bucket(0.0 if still else sample.motion),
                ),
                sample.number,
            ),
            # A still is repeated to T frames, each of which gets its own noise.
            moments_TMhw=None if moments is None else moments.expand(self.shape.num_frames, -1, -1, -1),
            context_LD=self._read_context(read, wanted, captioner),
            still=still,
        )
        max_pixels = (sample.height + CODED_MARGIN) * (sample.width + CODED_MARGIN)
        return _StoredClip(clip, media, wanted, draws, max_pixels)

    def _read_context(self, read: ReadMember, wanted: range, captioner: str) -> Tensor | None:
        """Read the cached CLIP embeddings of a clip, (L, D); None if the run does not use them."""
        if self.context is None:
            return None
        file = TensorFile(partial(read, clip_embeddings.MEMBER), clip_embeddings.MEMBER)
        if (origin := clip_embeddings.read_origin(file)) != (expected := self.source.embeddings_origin):
            raise ValueError(f"its CLIP embeddings are {origin}, but the first sample's are {expected}")
        expected_shape = self.source.embeddings_shapes[self.context]
        _check_shape("CLIP embeddings", clip_embeddings.embedding_shape(file, self.context), expected_shape)
        context_LD = clip_embeddings.read(file, self.context, wanted, captioner)
        if self.context == "text":  # The shape above is that of any caption, not of this one.
            _check_shape("CLIP embeddings", tuple(context_LD.shape), expected_shape)
        return context_LD

    def _decode(self, stored: _StoredClip, media: bytes) -> Clip:
        """Decode the frames of a clip from `media`, cropped, resized and possibly mirrored."""
        config, draws = self.config, stored.draws
        top, left = (draws.top, draws.left) if config.crop == "random" else (0.5, 0.5)
        mirrored = config.flip and draws.flip < 0.5 and not SIDES.search(stored.clip.caption)
        size = (self.shape.height, self.shape.width)
        frames_TCHW = read_frames(media, stored.wanted, size, top, left, mirrored, stored.max_pixels)
        return replace(stored.clip, frames_TCHW=frames_TCHW.expand(self.shape.num_frames, -1, -1, -1))


@dataclass(frozen=True)
class _StoredClip:
    """A clip as it was read from the file system, before decoding."""

    clip: Clip
    """Clip; its frames are missing if `media` is not None."""
    media: bytes | None
    """Bytes of the video or image to decode; None with cached latents."""
    wanted: range
    """Numbers of the clip's frames among the stored ones."""
    draws: ClipDraws
    max_pixels: int
    """Largest number of pixels of a frame in `media`, according to the index."""


def _check_shape(kind: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check that a sample's tensors can be batched with those of other samples.

    Raises:
        ValueError: the shape is not `expected`, that of the first sample.
    """
    if shape != expected:
        raise ValueError(f"its {kind} have shape {shape}, but the first sample's have {expected}")


@contextmanager
def _as_unreadable(
    sample_id: str, shard: str, is_transient: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Convert the errors that a library raises for a sample's bytes to UnreadableError: no sample ends a run.

    Failed assertions and out-of-memory errors are not converted.

    Args:
        sample_id: id of the sample.
        shard: path or URL of its shard.
        is_transient: returns True for an error after which a retry may succeed.
    """
    try:
        yield
    except (UnreadableError, AssertionError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
        fault = Fault(sample_id, shard, " ".join(cause.split()) or type(error).__name__, is_transient(error))
        raise UnreadableError(fault) from error


def read_captions(read: ReadMember, sample: Sample) -> dict[str, str]:
    """Read the captions of a sample.

    Returns:
        Captioner -> caption; one empty caption if the sample has neither json nor txt.

    Raises:
        ValueError: the json has no captions, or the text cannot be decoded.
    """
    if "json" in sample.members:
        captions = parse_captions(parse_json(read("json")))
        if not captions:
            raise ValueError("its json has no captions")
        return captions
    return {DEFAULT_CAPTIONER: decode_caption(read("txt")) if "txt" in sample.members else ""}
