"""From a sample's bytes to the frames of a clip: which frames, decoded, cropped, resized.

Shape legend: T frames, H x W pixels of the clip, C = 3 RGB channels.

Frames come at a whole stride of the stored ones, so motion stays even and the rate that the network is told
is exact; a clip too short for the wanted rate takes the largest stride that fits. The window of the wanted
aspect is cut out before it is resized, and resized by torch's antialiased bicubic filter on bytes: no slower
than swscale in one pass with the colour conversion, and within one level of Pillow's result, where
swscale's bicubic is off by up to 43.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb
from svd_ds.pixels.still import MAX_PIXELS


@dataclass(frozen=True)
class ClipDraws:
    """All that is random about reading a clip: uniform numbers in [0, 1)."""

    start: float
    top: float
    left: float
    flip: float
    caption: float
    still: float

    @staticmethod
    def draw(seed: int, ordinal: int) -> ClipDraws:
        """The draws of the run's `ordinal`-th sample: always all, in this order, so that no option moves
        another's."""
        generator = random.Random(f"clip {seed} {ordinal}")
        return ClipDraws(*(generator.random() for _ in range(6)))


@dataclass(frozen=True)
class Timing:
    """Which of the stored frames make the clip."""

    start: int
    stride: int
    fps: float
    """Of the clip: the stored rate over the stride."""

    @staticmethod
    def choose(
        stored_frames: int, stored_fps: float, num_frames: int, wanted_fps: float, draw: float
    ) -> Timing:
        """From a drawn start, frames as near `wanted_fps` as a whole stride comes; 0 takes every frame."""
        assert stored_frames >= num_frames, "short samples are left out of the order"
        stride = max(1, round(stored_fps / wanted_fps)) if wanted_fps else 1
        if num_frames > 1:
            stride = min(stride, (stored_frames - 1) // (num_frames - 1))
        num_starts = stored_frames - (num_frames - 1) * stride
        return Timing(start=int(draw * num_starts), stride=stride, fps=stored_fps / stride)

    def frame_numbers(self, num_frames: int) -> range:
        return range(self.start, self.start + num_frames * self.stride, self.stride)


@dataclass(frozen=True)
class Box:
    """A window of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @staticmethod
    def largest(frame: tuple[int, int], wanted: tuple[int, int], top: float = 0.5, left: float = 0.5) -> Box:
        """The largest window of the aspect of `wanted` in `frame`, both (H, W).

        `top` and `left`, in [0, 1), place it: 0.5 is the centre.
        """
        height, width = frame
        box_height = min(height, round(width * wanted[0] / wanted[1]))
        box_width = min(width, round(height * wanted[1] / wanted[0]))
        return Box(
            top=int(top * (height - box_height + 1)),
            left=int(left * (width - box_width + 1)),
            height=box_height,
            width=box_width,
        )


def resize_crop(frame_HWC: Tensor, box: Box, height: int, width: int, flip: bool = False) -> Tensor:
    """The pixels of `box`, resized with antialiasing to (height, width, 3); uint8 in and out."""
    window_HWC = frame_HWC[box.top : box.top + box.height, box.left : box.left + box.width]
    # The strides of this axis of one tell torch that channels are last: it resizes without copies.
    window_1CHW = window_HWC[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(window_1CHW, size=(height, width), mode="bicubic", antialias=True)
    resized_HWC = resized_1CHW[0].permute(1, 2, 0)
    return resized_HWC.flip(1) if flip else resized_HWC


def covers(frame: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Is a frame large enough to be reduced to `wanted` rather than enlarged? Both (H, W)."""
    box = Box.largest(frame, wanted)
    return box.height >= wanted[0] and box.width >= wanted[1]


def read_frames(
    content: bytes,
    wanted: Sequence[int],
    size: tuple[int, int],
    top: float = 0.5,
    left: float = 0.5,
    flip: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Some frames of a file held in memory, uint8 (T, 3, H, W): see `decode`, `Box.largest` and `resize_crop`.

    Channels are last in memory, as decoders and resizers have them; a batch and its device keep them so.
    Raises ValueError if the file cannot be decoded or ends too early, or if its frames are too large, or so
    small that they would have to be enlarged.
    """
    frames = []
    for frame in decode(content, wanted, max_pixels):
        frame_HWC = to_rgb(frame)
        height, width = frame_HWC.shape[:2]
        if not covers((height, width), size):
            raise ValueError(
                f"its frames have {height} x {width} pixels, and do not fill {size[0]} x {size[1]}"
            )
        frames.append(resize_crop(frame_HWC, Box.largest((height, width), size, top, left), *size, flip))
    return torch.stack(frames).permute(0, 3, 1, 2)


def choose_captioner(captions: Mapping[str, str], weights: Mapping[str, float], draw: float) -> str:
    """Draw one of a sample's captioners by their weights.

    Captioners without a weight are drawn, all alike, where the sample has none with one.
    Raises ValueError if no caption is left.
    """
    weight_of = {name: weights.get(name, 0.0) for name in sorted(captions)}
    if not any(weight_of.values()):
        weight_of = {name: float(name not in weights) for name in weight_of}
    total = sum(weight_of.values())
    if total == 0:
        raise ValueError(f"its captions ({', '.join(weight_of) or 'none'}) have no weight in {dict(weights)}")
    left = draw * total
    for name, weight in weight_of.items():
        left -= weight
        if left < 0:
            return name
    return max(weight_of, key=weight_of.__getitem__)
