"""Data settings: which clips a run sees, and how they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svd_ds.data.filters import Condition
from svd_ds.settings import Settings, choice, location, number, text

CROPS = ("random", "center")


@dataclass(frozen=True)
class Shape:
    """Shape of a clip: number of frames, and height and width of a frame in pixels."""

    num_frames: int
    height: int
    width: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Parse FRAMESxHEIGHTxWIDTH, such as 14x320x576.

        Raises:
            ValueError: the text has another form.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if match is None or not all(map(int, match.groups())):
            raise ValueError(f"data.buckets has {text!r}, which is not FRAMESxHEIGHTxWIDTH like 14x320x576")
        return Shape(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class DataConfig(Settings, section="data"):
    """Clips that a run sees, and how they are read."""

    path: str = location("data/shards")
    """Folder of shards with their index, written by tools/make_shards.py, or a URL (docs/data.md)."""
    num_frames: int = number(14, ge=1, le=10_000)
    """Frames per clip. Samples with fewer are left out; 1 trains on images and single frames of videos."""
    # No video codec has larger frames.
    height: int = number(320, ge=1, le=16_384)
    """Height of a clip in pixels. Samples with smaller frames are left out, not enlarged."""
    width: int = number(576, ge=1, le=16_384)
    """Width of a clip in pixels. Samples with smaller frames are left out, not enlarged."""
    fps: float = number(6.0, ge=0, le=1000)
    """Frame rate of a clip in frames per second, approximated by taking every n-th stored frame; 0 takes
    every stored frame."""
    crop: str = choice("random", CROPS)
    """Position of the crop to the aspect ratio of the clip: random | center."""
    flip: bool = False
    """Mirror half of the clips horizontally, except those whose English caption mentions left or right."""
    mixture: dict[str, float] = number(dict, ge=0, le=1e12, path_keys=True)
    """Folder or URL of each data set -> its weight among the clips, in any unit; replaces data.path. Empty:
    only data.path is read."""
    buckets: dict[str, int] = number(dict, ge=1, le=2**20)
    """Clip shape, such as 14x320x576 -> micro-batch size of a rank. All clips of a step have one shape. The
    shape of data.num_frames, data.height and data.width must be among them; previews and evaluations use it.
    Empty: all clips have that shape."""
    where: tuple[str, ...] = text(())
    """Conditions that a sample must meet, on the values in its index: "motion>=q25" (a quantile),
    "text_area<=0.07" (a value). Empty: all samples."""
    image_share: float = number(0.0, ge=0, le=1)
    """Fraction of the clips of videos that are replaced by a still image: one frame, repeated, which takes
    the network's image path. Above 0 the images of the data set are read too, always as stills."""
    latents: bool = False
    """Read the latents that tools/encode.py cached, in place of most frames. Requires data.crop=center and
    data.flip=false."""
    caption_weights: dict[str, float] = number(dict, ge=0, le=1e12)
    """Captioner -> weight with which its caption is drawn; 0: never. Captioners that are not named are drawn,
    with equal weights, only for samples whose named captioners all have weight 0. Empty: equal
    weights for all."""
    max_quarantined: float = number(0.01, ge=0, le=1)
    """Largest fraction of the samples that may be unreadable; each is replaced by the next sample. Above this
    fraction the run stops."""
    # One day: longer than anyone waits for a file system, and within the range of every system timer.
    read_timeout_seconds: float = number(600.0, gt=0, le=86_400)
    """Time limit in seconds for a read, or for the download of a remote shard. If it is exceeded, the file
    system hangs, and the run ends."""
    cache: str | None = location(None)
    """Local folder whose sub-folder svd_ds-cache keeps downloaded shards; null: no cache. Required for data
    sets at URLs."""
    cache_gb: float = number(0.0, ge=0, le=1e9)
    """Size limit of the cache in GB: above it the least recently read shards are removed; 0 keeps all. It
    must be large enough for the shards that are read at the same time."""
    # No machine has the cores for more processes per rank, and starting them would take minutes.
    num_workers: int = number(2, ge=0, le=256)
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = number(2, ge=1, le=1024)
    """Micro-batches that each decoding process prepares ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for condition in self.where:
            Condition.parse(condition)
        if self.latents and (self.crop != "center" or self.flip):
            raise ValueError(
                f"data.latents is true, data.crop is {self.crop} and data.flip is {str(self.flip).lower()}: "
                "cached latents need data.crop=center and data.flip=false"
            )
        _check_weights("caption_weights", self.caption_weights)
        _check_weights("mixture", self.mixture)
        self._check_buckets()

    def _check_buckets(self) -> None:
        if self.buckets and self.shape not in map(Shape.parse, self.buckets):
            raise ValueError(
                f"data.buckets has {', '.join(self.buckets)}, but not the shape of data.num_frames, "
                f"data.height and data.width, {self.shape}"
            )

    @property
    def shape(self) -> Shape:
        """Shape of previews and evaluations, and of all clips if there are no buckets."""
        return Shape(self.num_frames, self.height, self.width)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shape of every bucket; the main shape alone if there are no buckets."""
        return tuple(map(Shape.parse, self.buckets)) or (self.shape,)

    @property
    def sets(self) -> dict[str, float]:
        """Folder or URL of every data set -> its weight among the clips."""
        return {path: weight for path, weight in self.mixture.items() if weight} or {self.path: 1.0}

    @property
    def set_names(self) -> str:
        """Names of the data sets for error messages, with their weights if there are several."""
        if len(self.sets) == 1:
            return next(iter(self.sets))
        return " and ".join(f"{path} ({weight:g})" for path, weight in self.sets.items())


def _check_weights(name: str, weights: dict[str, float]) -> None:
    if weights and sum(weights.values()) == 0:
        raise ValueError(f"data.{name} has the weights {weights}: at least one must be above 0")
