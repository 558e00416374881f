"""Data card: the content of a curated data set and what was left out, as one self-contained HTML file.

clips of svd_ds/curate -> counts, histograms, pictures -> assets/data_card.html.jinja -> report.html
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from PIL import Image

from svd_ds.curate.measure import read_clip_frames
from svd_ds.curate.select import ClipRecord
from svd_ds.evaluation.charts import COLOURS, draw_histogram

MAX_PICTURES = 8
"""Maximum number of pictures of a group of clips, evenly spaced."""
PICTURE_HEIGHT = 120
"""Height of a picture in pixels."""
MAX_REFUSED = 200
"""Maximum number of lines of refused.csv that are shown."""
UNITS = {
    "motion": "shortest sides per second",
    "text_area": "share of the frame",
    "aesthetic": "score",
    "clip_similarity": "cosine",
}
"""Unit of each measure."""


@dataclass(frozen=True)
class ClipGroup:
    """The kept clips, or the clips that one filter removed."""

    name: str
    num_clips: int
    hours: float
    share: float
    """Fraction of the hours of all clips."""
    pictures: list[tuple[str, str]]
    """(caption, base64 of a JPEG) of some clips."""


def write_data_card(
    clips: Sequence[ClipRecord],
    refused: Sequence[tuple[str, str]],
    num_files: int,
    unmeasured: Sequence[str],
    out: Path,
) -> None:
    """Write OUT/report.html.

    Args:
        clips: all clips, kept or not.
        refused: (file, reason) of each refused file.
        num_files: number of raw files.
        unmeasured: columns that are empty because no model was given.
        out: output folder of the curation.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("svd_ds") / "assets" / "data_card.html.jinja").read_text())
    total = sum(clip.seconds for clip in clips)
    kept = [clip for clip in clips if clip.reason is None]
    filters = list(dict.fromkeys(clip.reason.split(":")[0] for clip in clips if clip.reason))
    groups = [_group("kept", kept, total, out)]
    for name in filters:
        removed = [clip for clip in clips if clip.reason and clip.reason.split(":")[0] == name]
        groups.append(_group(name, removed, total, out))
    html = template.render(
        title=f"Data card: {out.resolve().name}",
        facts=_facts(clips, kept, num_files),
        groups=groups,
        charts=_charts(clips),
        unmeasured=unmeasured,
        captioners=Counter(name for clip in kept for name in clip.captions).most_common(),
        refused=refused[:MAX_REFUSED],
        num_refused=len(refused),
    )
    (out / "report.html").write_text(html)


def _facts(clips: Sequence[ClipRecord], kept: Sequence[ClipRecord], num_files: int) -> dict[str, str]:
    """Key numbers of the data set, as in table 1 of arXiv 2311.15127."""
    hours = sum(clip.seconds for clip in kept) / 3600
    videos = len({clip.video for clip in clips})
    return {
        "clips kept": f"{len(kept):,} of {len(clips):,}",
        "hours kept": f"{hours:,.3f} of {sum(clip.seconds for clip in clips) / 3600:,.3f}",
        "mean length": f"{hours * 3600 / max(1, len(kept)):.2f} s",
        "mean frames": f"{sum(clip.num_frames for clip in kept) / max(1, len(kept)):.0f}",
        "clips per video": f"{len(clips) / max(1, videos):.2f}",
        "files with clips": f"{videos:,} of {num_files:,}",
        "copied without encoding": f"{sum(clip.method == 'copied' for clip in kept):,}",
    }


def _group(name: str, clips: Sequence[ClipRecord], total: float, out: Path) -> ClipGroup:
    seconds = sum(clip.seconds for clip in clips)
    readable = [clip for clip in clips if clip.motion is not None]
    num_shown = min(MAX_PICTURES, len(readable))
    shown = [readable[round(i * (len(readable) - 1) / max(1, num_shown - 1))] for i in range(num_shown)]
    pictures = [(clip.reason or clip.id, _picture(out / clip.media, clip.num_frames // 2)) for clip in shown]
    return ClipGroup(name, len(clips), seconds / 3600, seconds / total, pictures)


def _picture(media: Path, number: int) -> str:
    (pixels,) = read_clip_frames(media, [number])
    image = Image.fromarray(pixels)
    image.thumbnail((10 * PICTURE_HEIGHT, PICTURE_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _charts(clips: Sequence[ClipRecord]) -> list[str]:
    """Draw a histogram of each measure, with kept and removed clips apart."""
    numbers = {"seconds": ("length", "seconds"), "motion": ("motion", UNITS["motion"])}
    numbers |= {name: (name, UNITS.get(name, "")) for clip in clips for name in clip.annotations}
    charts = []
    for name, (title, unit) in numbers.items():
        parts = []
        for label, colour, is_kept in (("kept", COLOURS[0], True), ("removed", COLOURS[8], False)):
            part_clips = [clip for clip in clips if (clip.reason is None) == is_kept]
            values = [clip.seconds if name == "seconds" else clip.numeric_field(name) for clip in part_clips]
            parts.append((label, [value for value in values if value is not None], colour))
        if any(values for _, values, _ in parts):
            charts.append(draw_histogram(title, unit, parts))
    return charts
