"""Which clips a run sees, and how they are read: plain values, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svd_ds.data.filters import Condition
from svd_ds.settings import Settings, choice, location, number, text

CROPS = ("random", "center")


@dataclass(frozen=True)
class Shape:
    """Of a clip: frames, and pixels a frame."""

    num_frames: int
    height: int
    width: int

    @staticmethod
    def parse(text: str) -> Shape:
        """14x320x576 -> Shape(14, 320, 576). Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if match is None or not all(map(int, match.groups())):
            raise ValueError(f"data.buckets has {text!r}, which is no FRAMESxHEIGHTxWIDTH like 14x320x576")
        return Shape(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class DataConfig(Settings, section="data"):
    """Which clips a run sees, and how they are read."""

    path: str = location("data/shards")
    """Folder of shards with their index, as tools/make_shards.py writes it; or a URL, see docs/data.md."""
    num_frames: int = number(14, ge=1, le=10_000)
    """Frames a clip, T. Samples with fewer are left out; 1 trains on images (and single frames of videos)."""
    # No video codec has larger frames.
    height: int = number(320, ge=1, le=16_384)
    """Pixels. Samples that would have to be enlarged are left out."""
    width: int = number(576, ge=1, le=16_384)
    """Pixels."""
    fps: float = number(6.0, ge=0, le=1000)
    """Wanted frames a second, met as near as a whole stride comes; 0 takes every stored frame."""
    crop: str = choice("random", CROPS)
    """Where the window of the wanted aspect lies: "random" or "center"."""
    flip: bool = False
    """Mirror half of the clips, but for those whose caption names left or right (in English)."""
    mixture: dict[str, float] = number(dict, ge=0, le=1e12, path_keys=True)
    """Folder or URL -> its share of the clips, in any unit; empty: `path` alone, else in place of it."""
    buckets: dict[str, int] = number(dict, ge=1, le=2**20)
    """Shape, 14x320x576 -> clips that a rank takes at once. A step's clips have one shape. Empty: the shape
    above alone; else it is one of them, that of previews and evaluations."""
    where: tuple[str, ...] = text(())
    """Conditions that a sample must meet, on its index line alone: "motion>=q25", "text_area<=0.07"."""
    image_share: float = number(0.0, ge=0, le=1)
    """Share of the videos' clips that are a still image instead: one frame, repeated, which takes the image
    path. Above 0 the data set's own images are admitted as well, and always are stills."""
    latents: bool = False
    """Read what tools/encode.py cached in place of most pixels. Centred, never mirrored."""
    caption_weights: dict[str, float] = number(dict, ge=0, le=1e12)
    """Captioner's name -> weight with which its caption is drawn. Those without one are drawn, all alike,
    where a sample has none with one; 0 never is."""
    max_quarantined: float = number(0.01, ge=0, le=1)
    """Share of the samples that may turn out unreadable: each is replaced by the next. Beyond it the run
    stops."""
    # A day: no clock of the system waits for ever, and no file system is waited for that long.
    read_timeout_seconds: float = number(600.0, gt=0, le=86_400)
    """A read, or the fetching of a remote shard, that takes longer ends the run: the file system hangs."""
    cache: str | None = location(None)
    """Local folder that remote shards are fetched to, in a sub-folder svd_ds-cache; needed where a path is a
    URL."""
    cache_gb: float = number(0.0, ge=0, le=1e9)
    """Above it the fetched shards that were read least recently are removed from the cache; 0 keeps all. It
    must hold the shards that are read from at a time."""
    # No machine has the cores for more processes a rank, and starting them would take minutes.
    num_workers: int = number(2, ge=0, le=256)
    """Processes that decode, for each rank; 0 decodes in the training process."""
    prefetch: int = number(2, ge=1, le=1024)
    """Micro-batches that each worker holds ready."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for condition in self.where:
            Condition.parse(condition)
        if self.latents and (self.crop != "center" or self.flip):
            raise ValueError(
                "data.latents=true needs data.crop=center and data.flip=false, as latents are made, but they "
                f"are {self.crop} and {str(self.flip).lower()}"
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
        """The main shape: of previews and evaluations, and where there are no buckets of all clips."""
        return Shape(self.num_frames, self.height, self.width)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every bucket; the main shape alone where none is named."""
        return tuple(map(Shape.parse, self.buckets)) or (self.shape,)

    @property
    def sets(self) -> dict[str, float]:
        """Every data set's folder or URL -> its share of the clips."""
        return {path: weight for path, weight in self.mixture.items() if weight} or {self.path: 1.0}

    @property
    def set_names(self) -> str:
        """The data sets, as errors name them; with their weights, where there are several."""
        if len(self.sets) == 1:
            return next(iter(self.sets))
        return " and ".join(f"{path} ({weight:g})" for path, weight in self.sets.items())


def _check_weights(name: str, weights: dict[str, float]) -> None:
    if weights and sum(weights.values()) == 0:
        raise ValueError(f"data.{name} has the weights {weights}: at least one must be above 0")
