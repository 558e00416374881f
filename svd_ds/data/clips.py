"""Frames of a clip from the bytes of a sample: chosen, decoded, cropped and resized.

Shape legend: T frames, H x W pixels of the clip, C = 3 RGB channels.

The stride between frames is a whole number of stored frames, so motion is uniform and the frame rate that
conditions the network is exact; a sample too short for the wanted rate takes the largest stride that fits.
The window of the wanted aspect ratio is cut out first, then resized by torch's antialiased bicubic filter on
uint8: no slower than swscale in one pass with the colour conversion, and within one level of Pillow's result,
from which swscale's bicubic filter differs by up to 43 levels.
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
    """Random numbers for the choices in reading a clip, uniform in [0, 1)."""

    start: float
    top: float
    left: float
    flip: float
    caption: float
    still: float

    @staticmethod
    def draw(seed: int, ordinal: int) -> ClipDraws:
        """Make the draws of a sample ordinal.

        All of them are always made, in this order, so that no option changes the draw of another.
        """
        generator = random.Random(f"clip {seed} {ordinal}")
        return ClipDraws(*(generator.random() for _ in range(6)))


@dataclass(frozen=True)
class Timing:
    """Choice of the stored frames that make a clip."""

    start: int
    """Number of the first frame."""
    stride: int
    """Stored frames from one frame of the clip to the next."""
    fps: float
    """Frame rate of the clip in frames a second: the stored rate divided by the stride."""

    @staticmethod
    def choose(
        stored_frames: int, stored_fps: float, num_frames: int, wanted_fps: float, draw: float
    ) -> Timing:
        """Choose the stride nearest to the wanted frame rate, and the start from a random draw.

        Args:
            stored_frames: frames of the sample.
            stored_fps: their rate, in frames a second.
            num_frames: frames of the clip.
            wanted_fps: wanted rate, in frames a second; 0 takes every stored frame.
            draw: uniform number in [0, 1) that selects the start.
        """
        assert stored_frames >= num_frames, "short samples are left out of the order"
        stride = max(1, round(stored_fps / wanted_fps)) if wanted_fps else 1
        if num_frames > 1:
            stride = min(stride, (stored_frames - 1) // (num_frames - 1))
        num_starts = stored_frames - (num_frames - 1) * stride
        return Timing(start=int(draw * num_starts), stride=stride, fps=stored_fps / stride)

    def frame_numbers(self, num_frames: int) -> range:
        """Return the numbers of the clip's frames among the stored ones."""
        return range(self.start, self.start + num_frames * self.stride, self.stride)


@dataclass(frozen=True)
class Box:
    """Window of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @staticmethod
    def largest(frame: tuple[int, int], wanted: tuple[int, int], top: float = 0.5, left: float = 0.5) -> Box:
        """Return the largest window of a wanted aspect ratio in a frame.

        Args:
            frame: (height, width) of the frame in pixels.
            wanted: (height, width) that gives the aspect ratio.
            top: vertical position of the window, in [0, 1); 0.5 is the centre.
            left: horizontal position of the window, in [0, 1); 0.5 is the centre.
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


def resize_crop(frame: Tensor, box: Box, height: int, width: int, flip: bool = False) -> Tensor:
    """Crop a frame to a window and resize that with antialiasing.

    Args:
        frame: uint8 RGB, (H, W, 3).
        box: window of the frame.
        height: height of the result in pixels.
        width: width of the result in pixels.
        flip: mirror the result horizontally.

    Returns:
        uint8 RGB, (height, width, 3).
    """
    window_HWC = frame[box.top : box.top + box.height, box.left : box.left + box.width]
    # The strides of the added axis mark the tensor as channels_last, which torch resizes without copies.
    window_1CHW = window_HWC[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(window_1CHW, size=(height, width), mode="bicubic", antialias=True)
    resized_HWC = resized_1CHW[0].permute(1, 2, 0)
    return resized_HWC.flip(1) if flip else resized_HWC


def covers(frame: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Return True if a frame of size (H, W) need not be enlarged to cover the wanted size (H, W)."""
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
    """Decode, crop and resize some frames of a file held in memory.

    Args:
        content: bytes of a video or image file.
        wanted: ascending frame numbers, see `decode`.
        size: (height, width) of the result in pixels.
        top: vertical position of the window, see `Box.largest`.
        left: horizontal position of the window.
        flip: mirror the frames horizontally.
        max_pixels: largest allowed number of pixels of a stored frame.

    Returns:
        uint8 RGB, (T, 3, H, W), channels last in memory as decoders and resizers produce them.

    Raises:
        ValueError: the file cannot be decoded or ends too early, or its frames are too large, or so small
            that they would have to be enlarged.
    """
    frames = []
    for frame in decode(content, wanted, max_pixels):
        frame_HWC = to_rgb(frame)
        height, width = frame_HWC.shape[:2]
        if not covers((height, width), size):
            raise ValueError(
                f"its frames have {height} x {width} pixels, and do not cover {size[0]} x {size[1]}"
            )
        frames.append(resize_crop(frame_HWC, Box.largest((height, width), size, top, left), *size, flip))
    return torch.stack(frames).permute(0, 3, 1, 2)


def choose_captioner(captions: Mapping[str, str], weights: Mapping[str, float], draw: float) -> str:
    """Draw one of a sample's captioners by weight.

    If none of the sample's captioners has a weight above 0, those that `weights` does not name are equally
    likely.

    Args:
        captions: captioner -> caption.
        weights: captioner -> weight (data.caption_weights).
        draw: uniform number in [0, 1).

    Raises:
        ValueError: `weights` names all captioners of the sample, with weight 0.
    """
    weight_by_name = {name: weights.get(name, 0.0) for name in sorted(captions)}
    if not any(weight_by_name.values()):
        weight_by_name = {name: float(name not in weights) for name in weight_by_name}
    total = sum(weight_by_name.values())
    if total == 0:
        raise ValueError(
            f"its captions ({', '.join(weight_by_name) or 'none'}) have no weight above 0 in "
            f"data.caption_weights={dict(weights)}"
        )
    remaining = draw * total
    for name, weight in weight_by_name.items():
        remaining -= weight
        if remaining < 0:
            return name
    return max(weight_by_name, key=weight_by_name.__getitem__)
