"""Reader: turns a sample of one data set into a clip of one shape.

Its bytes are read within a time limit, then decoded. A latent cache (latents.py) gives the clip's moments and
the pixels of its conditioning frames; cached CLIP embeddings (clip_embeddings.py) give the input of the
cross-attention. Random choices are the same with and without these caches.
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
"""Words of a caption that mirroring the clip would make wrong."""
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
    """Kind of cached CLIP embeddings to read: image, ends or text; None: none."""
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
        take = with_timeout(lambda: self._take(number, ordinal), seconds, hung)
        with _as_unreadable(take.clip.id, shard):
            return take.clip if take.media is None else self._decode(take, take.media)

    def _take(self, number: int, ordinal: int) -> _Take:
        """Read the clip's bytes from the file system."""
        shard = self.index.shard_location(number)
        with _as_unreadable(f"number {number}", shard, is_retryable):
            sample = self.index.sample(number)
        with _as_unreadable(sample.id, shard, is_retryable), self.index.open(sample) as read:
            return self._take_from(read, sample, ordinal)

    def _take_from(self, read: ReadMember, sample: Sample, ordinal: int) -> _Take:
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
            if (other := latents.read_origin(file)) != (ours := self.source.latents_origin):
                raise ValueError(f"its latents are {other}, and the first sample's {ours}")
            _check_shape("latents", latents.moments_shape(file), self.source.latents_shape)
            given = [wanted[0], wanted[-1]] if self.read_last_frame else [wanted[0]]
            moments, frames = latents.read_moments(file, wanted), latents.read_frames(file, given)
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
            # One image T times, in the shape of a clip: each of the T gets noise of its own.
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
            raise ValueError(f"its CLIP embeddings are {other}, and the first sample's {ours}")
        ours_shape = self.source.embeddings_shapes[self.context]
        _check_shape("CLIP embeddings", clip_embeddings.embedding_shape(file, self.context), ours_shape)
        found_LD = clip_embeddings.read(file, self.context, wanted, captioner)
        if self.context == "text":  # Each caption has embeddings of its own.
            _check_shape("CLIP embeddings", tuple(found_LD.shape), ours_shape)
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
    """Contents of a sample: a clip, without its frames if these are still to be decoded from `media`."""

    clip: Clip
    media: bytes | None
    wanted: range
    """Indices of the clip's frames among the stored ones."""
    draws: ClipDraws
    max_pixels: int
    """Largest number of pixels of a frame in `media`, by the index."""


def _check_shape(what: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> None:
    """Check that a sample's tensors can be in one batch with the others'.

    Raises:
        ValueError: they have another shape than the first sample's.
    """
    if shape != ours:
        raise ValueError(f"its {what} have shape {shape}, and the first sample's {ours}")


@contextmanager
def _as_unreadable(
    sample_id: str, shard: str, is_transient: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Turn the errors that a library raises for a sample's bytes into UnreadableError: no sample ends a run.

    Our own assertions, and a machine out of memory, still do.

    Args:
        is_transient: returns True for an error after which the sample may be readable another time.
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
    """Read the captions of a sample: captioner -> caption; an empty one if it has neither json nor txt.

    Raises:
        ValueError: the json has no captions, or the text cannot be decoded.
    """
    if "json" in sample.members:
        captions = parse_captions(parse_json(read("json")))
        if not captions:
            raise ValueError("its json has no captions")
        return captions
    return {DEFAULT_CAPTIONER: decode_caption(read("txt")) if "txt" in sample.members else ""}
