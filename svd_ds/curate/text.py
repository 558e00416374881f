"""How much of the picture is text: boxes of a text detector over the frame, as arXiv 2311.15127 does with
CRAFT.

The detector is PP-OCR's, whose weights come inside the package rapidocr. By path it is another of its kind
(differentiable binarisation, in ONNX), or CRAFT.
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
from svd_ds.curate.measure import three_frames
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row

COLUMNS = {"id": pa.string(), "text_area": pa.float64()}


@dataclass(frozen=True)
class TextSettings:
    model: str = ""
    """Path of a detector in ONNX or of CRAFT's weights; empty: the one inside rapidocr."""
    side: int = 480
    """Shortest side to which a smaller frame is enlarged, in pixels."""
    min_score: float = 0.7
    """Of a box. Drawn text has 0.8 to 0.9 here; faces and windows that pass for it have up to 0.66."""

    def __post_init__(self) -> None:
        if self.model and not Path(self.model).is_file():
            raise FileNotFoundError(f"there is no text detector {self.model}")
        if self.is_craft:
            # Here it is the user's mistake; in a stage it would be every file's.
            craft.load(Path(self.model))

    @property
    def is_craft(self) -> bool:
        return Path(self.model).suffix in craft.SUFFIXES


def measure_text(settings: TextSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """The share of each clip's frame that boxes of text cover: mean of its first, middle and last frame."""
    for clip in known["clips"]:
        areas = [text_area(frame, settings) for frame in three_frames(clip, place)]
        yield {"id": clip["id"], "text_area": round(float(np.mean(areas)), 6)}


def text_area(frame_HWC: np.ndarray, settings: TextSettings) -> float:
    """Share of a uint8 RGB frame that lies inside boxes of text; where boxes overlap it counts once."""
    covered_HW = np.zeros(frame_HWC.shape[:2], dtype=np.uint8)
    for corners in _find_text(frame_HWC, settings):
        cv2.fillConvexPoly(covered_HW, np.round(corners).astype(np.int32), 1)
    return float(covered_HW.mean())


def _find_text(frame_HWC: np.ndarray, settings: TextSettings) -> Sequence[np.ndarray]:
    """Corners of each box, (4, 2)."""
    if settings.is_craft:
        return craft.find_text(craft.load(Path(settings.model)), frame_HWC, settings.side, settings.min_score)
    picture = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR)
    boxes = _detector(settings)(picture, use_det=True, use_cls=False, use_rec=False).boxes
    return [] if boxes is None else boxes


@cache
def _detector(settings: TextSettings) -> Any:
    """One a process."""
    from rapidocr import RapidOCR  # takes a second, and has a log of its own

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
