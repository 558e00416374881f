"""Share of the frame that is covered by text: boxes of a text detector, as arXiv 2311.15127 does with CRAFT.

The default detector is PP-OCR's, whose weights are part of the package rapidocr. A path may name another one
of the same kind (differentiable binarisation, in ONNX), or CRAFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from svd_ds.curate import craft
from svd_ds.curate.measure import read_three_frames
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage

COLUMNS = {"id": pa.string(), "text_area": pa.float64()}


@dataclass(frozen=True)
class TextSettings:
    """Text detector and its thresholds."""

    model: str = ""
    """Path of a detector in ONNX, or of CRAFT's weights; empty for the detector inside rapidocr."""
    side: int = 480
    """Shortest side to which smaller frames are enlarged, in pixels."""
    min_score: float = 0.7
    """Minimum score of a box. Drawn text scores 0.8 to 0.9 here; faces and windows mistaken for text up to
    0.66."""

    def __post_init__(self) -> None:
        if self.model and not Path(self.model).is_file():
            raise FileNotFoundError(f"there is no text detector {self.model}")
        if self.is_craft:
            # Loaded here so that a wrong file is reported once; in a stage it would refuse every file.
            craft.load_craft(Path(self.model))

    @property
    def is_craft(self) -> bool:
        """True if `model` is a file of CRAFT's weights."""
        return Path(self.model).suffix in craft.WEIGHT_SUFFIXES


def measure_text(
    settings: TextSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield the share of each clip's frame that is covered by text: mean of its first, middle and last
    frame."""
    for clip in inputs["clips"]:
        areas = [text_area(frame, settings) for frame in read_three_frames(clip, context)]
        yield {"id": clip["id"], "text_area": round(float(np.mean(areas)), 6)}


def text_area(frame: np.ndarray, settings: TextSettings) -> float:
    """Compute the share of a uint8 RGB frame, (H, W, 3), inside text boxes; overlaps count once."""
    covered_HW = np.zeros(frame.shape[:2], dtype=np.uint8)
    for corners in _find_text(frame, settings):
        cv2.fillConvexPoly(covered_HW, np.round(corners).astype(np.int32), 1)
    return float(covered_HW.mean())


def _find_text(frame_HWC: np.ndarray, settings: TextSettings) -> Sequence[np.ndarray]:
    """Return the corners of each box, (4, 2)."""
    if settings.is_craft:
        return craft.find_text(
            craft.load_craft(Path(settings.model)), frame_HWC, settings.side, settings.min_score
        )
    picture = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR)
    boxes = _detector(settings)(picture, use_det=True, use_cls=False, use_rec=False).boxes
    return [] if boxes is None else boxes


@cache
def _detector(settings: TextSettings) -> Any:
    """Load rapidocr's detector, once per process."""
    from rapidocr import RapidOCR  # takes a second, and configures its own log

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.model_path": settings.model or None,
            "Det.limit_side_len": settings.side,
            "Det.box_thresh": settings.min_score,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
