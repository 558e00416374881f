"""From a sample of one data set to a clip of one shape: what it needs is read, in time, then decoded.

From a latent cache (latents.py) come the clip's moments and the pixels of its given frames, and from cached
CLIP states (states.py) what the cross-attention sees. What is random is the same with and without them.
"""

from __future__ import annotations

import math
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
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, is_out_of_memory
from svd_ds.data.read_timeout import with_timeout
from svd_ds.data.sample import Sample
from svd_ds.data.shards import Index, ReadMember
from svd_ds.data.sidecar import DEFAULT_CAPTIONER, decode_caption, parse_captions, parse_json
from svd_ds.data.sources import DatasetSource

SIDES = re.compile(r"\b(left|right)(\b|ward|most|hand)", re.IGNORECASE)
"""What a caption says that a mirror would make untrue."""
CODED_MARGIN = 128
"""Pixels by which a decoder's frame may be higher and wider than what is shown of it."""
NO_FRAMES = torch.empty(0, 3, 0, 0, dtype=torch.uint8)


class UnreadableError(Exception):
    """A sample that cannot be made a clip of."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


@dataclass(frozen=True)
class Reader:
    """Reads the samples that a data set has in a bucket."""

    config: DataConfig
    shape: Shape
    source: DatasetSource
    index: Index
    """The source's samples of that shape."""
    motion_map: MotionMap
    """Of all the run's data sets together."""
    seed: int
    context: str | None
    """Which cached states are read: image, ends or text; None: none."""
    ends: bool
    """Whether the last frame's pixels come with the first's, beside latents."""

    def read(self, number: int, ordinal: int) -> Clip:
        """Sample `number` as the run's `ordinal`-th clip.

        Raises UnreadableError where it cannot be read, ReadTimeoutError where that takes too long.
        """
        shard = self.index.shard_location(number)
        seconds = self.config.read_timeout_seconds
        hung = f"a read of {shard} has hung for data.read_timeout_seconds={seconds:g}"
        take = with_timeout(lambda: self._take(number, ordinal), seconds, hung)
        with _faults_of(take.clip.id, shard):
            return take.clip if take.media is None else self._decode(take, take.media)

    def _take(self, number: int, ordinal: int) -> _Take:
        """Read from the file system what the clip needs."""
        shard = self.index.shard_location(number)
        with _faults_of(f"number {number}", shard, is_retryable):
            sample = self.index.sample(number)
        with _faults_of(sample.id, shard, is_retryable), self.index.open(sample) as read:
            return self._take_from(read, sample, ordinal)

    def _take_from(self, read: ReadMember, sample: Sample, ordinal: int) -> _Take:
        config, draws = self.config, ClipDraws.draw(self.seed, ordinal)
        # Where videos are learned from, a single frame is a still: it takes the image path.
        still = config.num_frames > 1 and (
            sample.num_frames == 1 or self.shape.num_frames == 1 or draws.still < config.image_share
        )
        num_frames = 1 if still else self.shape.num_frames
        timing = Timing.choose(sample.num_frames, sample.fps, num_frames, config.fps, draws.start)
        wanted = timing.frame_numbers(num_frames)
        captions = captions_of(read, sample)
        captioner = choose_captioner(captions, config.caption_weights, draws.caption)
        media, moments, frames = None, None, NO_FRAMES
        if self.source.latents_origin is None:
            media = read(sample.media)
        else:
            file = TensorFile(partial(read, latents.MEMBER), latents.MEMBER)
            if (other := latents.read_origin(file)) != (ours := self.source.latents_origin):
                raise ValueError(f"its latents are {other}, and the first sample's {ours}")
            _check_shape("latents", latents.moments_shape(file), self.source.latents_shape)
            given = [wanted[0], wanted[-1]] if self.ends else [wanted[0]]
            moments, frames = latents.read_moments(file, wanted), latents.read_frames(file, given)
        clip = Clip(
            id=sample.id,
            ordinal=ordinal,
            frames_TCHW=frames,
            caption=captions[captioner],
            fps=timing.fps,
            motion_bucket=self.motion_map.bucket(0.0 if still else sample.motion),
            elevation=math.nan if sample.elevation is None else sample.elevation,
            # T lessons of one image, in the shape of a clip: each of the T gets noise of its own.
            moments_TMhw=None if moments is None else moments.expand(self.shape.num_frames, -1, -1, -1),
            context_LD=self._context(read, wanted, captioner),
            still=still,
        )
        max_pixels = (sample.height + CODED_MARGIN) * (sample.width + CODED_MARGIN)
        return _Take(clip, media, wanted, draws, max_pixels)

    def _context(self, read: ReadMember, wanted: range, captioner: str) -> Tensor | None:
        if self.context is None:
            return None
        file = TensorFile(partial(read, clip_embeddings.MEMBER), clip_embeddings.MEMBER)
        if (other := clip_embeddings.read_origin(file)) != (ours := self.source.embeddings_origin):
            raise ValueError(f"its states are {other}, and the first sample's {ours}")
        ours_shape = self.source.embeddings_shapes[self.context]
        _check_shape("states", clip_embeddings.embedding_shape(file, self.context), ours_shape)
        found_LD = clip_embeddings.read(file, self.context, wanted, captioner)
        if self.context == "text":  # Each caption has states of its own.
            _check_shape("states", tuple(found_LD.shape), ours_shape)
        return found_LD

    def _decode(self, take: _Take, media: bytes) -> Clip:
        config, draws = self.config, take.draws
        top, left = (draws.top, draws.left) if config.crop == "random" else (0.5, 0.5)
        mirrored = config.flip and draws.flip < 0.5 and not SIDES.search(take.clip.caption)
        size = (self.shape.height, self.shape.width)
        frames_TCHW = read_frames(media, take.wanted, size, top, left, mirrored, take.max_pixels)
        return replace(take.clip, frames_TCHW=frames_TCHW.expand(self.shape.num_frames, -1, -1, -1))


@dataclass(frozen=True)
class _Take:
    """What was read of a sample: a clip, still without its frames where they are in `media`."""

    clip: Clip
    media: bytes | None
    wanted: range
    """Numbers of the clip's frames among the stored ones."""
    draws: ClipDraws
    max_pixels: int
    """Pixels that a frame in `media` may have, by the index."""


def _check_shape(what: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> None:
    """Raises ValueError where a sample's tensors cannot be in one batch with the others'."""
    if shape != ours:
        raise ValueError(f"its {what} have shape {shape}, and the first sample's {ours}")


@contextmanager
def _faults_of(
    sample_id: str, shard: str, passes: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Make UnreadableError of whatever a sample's bytes make a library raise: one sample never ends a run.

    Our own assertions, and a machine out of memory, do.

    Args:
        passes: whether the sample may be readable another time.
    """
    try:
        yield
    except (UnreadableError, AssertionError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
        fault = Fault(sample_id, shard, " ".join(cause.split()) or type(error).__name__, passes(error))
        raise UnreadableError(fault) from error


def captions_of(read: ReadMember, sample: Sample) -> dict[str, str]:
    """Captioner -> caption; of an external sample with neither json nor txt one that is empty.

    Raises:
        ValueError: its json has no captions, or its text cannot be decoded.
    """
    if "json" in sample.members:
        captions = parse_captions(parse_json(read("json")))
        if not captions:
            raise ValueError("its json has no captions")
        return captions
    return {DEFAULT_CAPTIONER: decode_caption(read("txt")) if "txt" in sample.members else ""}
