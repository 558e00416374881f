"""Motion scores of known motions."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from svd_ds.curate.flow import motion_score


def panning(speed: float, num_frames: int, height: int = 96, width: int = 160) -> list[np.ndarray]:
    """A random texture with detail of all sizes over which the camera pans, at `speed` pixels a frame."""
    generator = np.random.default_rng(0)
    layers = [generator.normal(size=(height, 2 * width)).astype(np.float32) for _ in range(4)]
    layers = [cv2.GaussianBlur(layer, (0, 0), 2.0**octave) for octave, layer in enumerate(layers, 1)]
    grey = sum(layer / layer.std() for layer in layers) * 20 + 128
    texture = np.clip(np.repeat(grey[..., None], 3, axis=2), 0, 255).astype(np.uint8)
    return [np.ascontiguousarray(texture[:, round(speed * n) :][:, :width]) for n in range(num_frames)]


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
def test_score_is_the_speed_in_shortest_sides_a_second(speed: float) -> None:
    score = motion_score(panning(speed, 49), fps=24.0)
    assert score == pytest.approx(speed * 24 / 96, rel=0.05)


def test_score_depends_on_neither_size_nor_frame_rate() -> None:
    frames = panning(0.5, 49)
    score = motion_score(frames, fps=24.0)
    doubled = [cv2.resize(frame, None, fx=2, fy=2) for frame in frames]
    assert motion_score(doubled, fps=24.0) == pytest.approx(score, rel=0.1)
    assert motion_score(frames[::2], fps=12.0) == pytest.approx(score, rel=0.1)


def test_score_of_short_clips_and_single_frames() -> None:
    frames = panning(1.0, 6)
    assert motion_score(frames, fps=24.0) == pytest.approx(24 / 96, rel=0.25)
    assert motion_score(frames[:1], fps=24.0) == 0.0
    assert motion_score([frames[0]] * 6, fps=24.0) == pytest.approx(0.0, abs=1e-3)
