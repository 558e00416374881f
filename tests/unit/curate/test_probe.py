"""Frame rate and first frame of a video, from its packets."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

import av
import pytest

from svd_ds.curate.probe import find_rate, probe_video
from svd_ds.data.timeline import typical_rate
from tests.videos import moving_square

FILM = Fraction(24000, 1001)


def rounded(times: list[float]) -> list[float]:
    """Round times to whole milliseconds, as Matroska stores them."""
    return [round(time, 3) for time in times]


@pytest.mark.parametrize("rate", [FILM, Fraction(24), Fraction(30000, 1001), Fraction(60), Fraction(13)])
def test_rate_of_rounded_times_overrides_a_wrong_declared_rate(rate: Fraction) -> None:
    times = rounded([float(number / rate) for number in range(2000)])
    assert find_rate(times, Fraction(1000)) == (rate, True)


def test_variable_rate_is_the_rate_of_the_usual_gap() -> None:
    """Some frames are shown twice as long; at a rate of 42 ms one frame in 100 would be missed."""
    gaps = [1 / 24] * 700 + [2 / 24] * 20 + [1 / 24] * 30
    times = rounded([0.0, *accumulate(gaps)])
    assert find_rate(times, Fraction(1000)) == (24, False)


def test_usual_rate_is_not_that_of_the_rounded_median() -> None:
    times = rounded([number / 24 for number in range(200)])
    gaps = [after - before for before, after in pairwise(times)]
    assert typical_rate([*gaps, 5.0]) == pytest.approx(24, rel=1e-3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("suffix", ["ts", "mp4"])
def test_first_frame_of_a_file_with_one_keyframe_is_found(codec: str, suffix: str, tmp_path: Path) -> None:
    """MPEG-TS has no index: a seek to the first time lands after the only keyframe."""
    path = tmp_path / f"video.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 100
        stream.codec_context.max_b_frames = 2
        for pixels in moving_square(12, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    found = probe_video(path)
    assert (found["num_frames"], found["height"], found["width"], found["rate"]) == (12, 48, 64, "25")
