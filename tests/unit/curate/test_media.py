"""Encoded clips: colours, and reproducible bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np

from svd_ds.curate.media import ClipEncoder
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb
from tests.videos import moving_square


def encode_clip(frames_THWC: np.ndarray) -> bytes:
    encoder = ClipEncoder(Fraction(24), *frames_THWC.shape[1:3])
    for frame_HWC in frames_THWC:
        encoder.add(frame_HWC)
    return encoder.finish()


def test_colours_survive_encoding() -> None:
    frames = np.zeros((4, 64, 96, 3), dtype=np.uint8)
    frames[:, :, :32], frames[:, :, 32:64], frames[:, :, 64:] = (200, 30, 30), (30, 180, 40), (30, 40, 200)
    for frame in decode(encode_clip(frames), range(4)):
        pixels = to_rgb(frame).numpy().astype(int)
        for column in (16, 48, 80):
            assert np.abs(pixels[32, column] - frames[0, 32, column]).max() <= 6


ENCODE = """
import hashlib
from tests.unit.curate.test_media import encode_clip
from tests.videos import moving_square
print(hashlib.sha256(encode_clip(moving_square(25, 144, 192))).hexdigest())
"""


def test_encoding_does_not_depend_on_uninitialised_memory() -> None:
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", ENCODE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == hashlib.sha256(encode_clip(moving_square(25, 144, 192))).hexdigest(), (
        result.stderr
    )
