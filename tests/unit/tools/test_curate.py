"""tools/curate.py end to end: junk, filters, parts, interruptions, subsets."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.filters import select_samples
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from tests.curation import real_shots
from tests.unit.tools.conftest import ToolResult
from tests.videos import encode, moving_square, write_video

TOOL = Path(__file__).parents[3] / "tools" / "curate.py"


@pytest.fixture
def curate(tool_output: Callable[..., ToolResult]) -> Callable[..., ToolResult]:
    """Run the tool in this process, unless `--workers` is given."""

    def run(*arguments: object) -> ToolResult:
        in_process = arguments[0] != "sweep-thresholds" and "--workers" not in arguments
        return tool_output("curate.py", *arguments, *(("--workers", 0) if in_process else ()))

    return run


def read_clips(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(out / "clips.parquet").to_pylist()}


def read_refused(out: Path) -> dict[str, str]:
    with open(out / "refused.csv", newline="") as file:
        return {row["video"]: row["reason"] for row in csv.DictReader(file)}


def write_timed_video(
    path: Path, frames: np.ndarray, times: list[int], pixels: str = "yuv420p", **options: str
) -> None:
    """Write frames at given times, in milliseconds."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame_HWC, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def constant_times(num_frames: int) -> list[int]:
    return [40 * number for number in range(num_frames)]


@pytest.fixture(scope="module")
def junk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken and unusual files as found on the internet, and three good videos."""
    folder = tmp_path_factory.mktemp("junk")
    frames = moving_square(60, speed=0.7)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video")
    (folder / "notes.doc").write_text("junk")
    (folder / "broken.png").write_bytes(b"\x89PNG junk")
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    write_video(folder / "one_frame.mp4", frames[:1])
    irregular = np.cumsum([0, *np.random.default_rng(0).choice([20, 40, 100], 59)]).tolist()
    write_timed_video(folder / "variable.mkv", frames, irregular)
    write_video(folder / "portrait.mp4", moving_square(60, height=64, width=48, speed=0.7, seed=1), fps=25)
    write_timed_video(folder / "ten_bit.mkv", frames, constant_times(60), "yuv420p10le")
    jump = [*constant_times(30), *(time + 3_600_000 for time in constant_times(30))]
    write_timed_video(folder / "jump.mkv", frames, jump)
    good = write_video(folder / "good.mp4", moving_square(60, speed=0.7, seed=2), fps=25).read_bytes()
    (folder / "no_index.mp4").write_bytes(good[: len(good) // 2])
    write_timed_video(folder / "complete.mp4", real_shots()["man"], constant_times(120), movflags="faststart")
    complete = (folder / "complete.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(complete[: len(complete) * 3 // 4])
    (folder / "complete.mp4").unlink()
    damaged = bytearray(encode(real_shots()["man"], fps=25))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2000] = bytes(2000)
    (folder / "damaged.mp4").write_bytes(damaged)
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_junk_is_refused_with_reasons_and_good_files_are_kept(
    curate: Callable[..., ToolResult], junk: Path, tmp_path: Path, workers: int
) -> None:
    result = curate(
        junk, tmp_path, "--shortest", "1s", "--text-model", "none", "--keep-duplicates", "--workers", workers
    )
    assert result.code == 0, result.err
    refused, clips = read_refused(tmp_path), read_clips(tmp_path)
    assert "cannot be decoded" in refused["empty.mp4"] and "cannot be decoded" in refused["text.mp4"]
    assert "cannot be decoded" in refused["no_index.mp4"]
    assert "neither a video nor an image" in refused["notes.doc"]
    assert "cannot be read" in refused["broken.png"]
    assert refused["audio.mp4"] == "it has no video stream"
    assert refused["one_frame.mp4"] == "its number of frames is 1: a video needs at least 2"
    assert refused["jump.mkv"] == "its clock jumps by 3599 s after frame 29"
    assert {"truncated.mp4", "damaged.mp4"} < set(refused), "files that give clips are reported too"
    assert not {"good.mp4", "portrait.mp4", "variable.mkv", "ten_bit.mkv"} & set(refused)

    videos = {clip["video"]: clip for clip in clips.values()}
    assert {"good.mp4", "portrait.mp4", "variable.mkv", "ten_bit.mkv", "truncated.mp4"} <= set(videos)
    assert (videos["portrait.mp4"]["height"], videos["portrait.mp4"]["width"]) == (64, 48)
    assert videos["ten_bit.mkv"]["method"] == "encoded" and videos["good.mp4"]["method"] == "copied"
    assert videos["truncated.mp4"]["end_frame"] < 120
    # The usual gap is 40 ms, which gives the rate. The clip is as long as the video.
    variable = videos["variable.mkv"]
    assert variable["fps"] == 25 and variable["end_frame"] == pytest.approx(60 * 53.3 / 40, abs=12)

    loader = Loader(DataConfig(str(tmp_path / "shards"), 8, 40, 40, num_workers=0), 0, 0, 1, BatchConfig(1))
    assert loader.num_left_out == 0
    for _, (batch, _) in zip(clips, loader, strict=False):
        assert batch.frames_BTCHW.shape == (1, 8, 3, 40, 40)


def add_text(frames: np.ndarray) -> np.ndarray:
    captioned = frames.copy()
    for frame in captioned:
        for line in range(3):
            at = (12, 40 + 40 * line)
            cv2.putText(frame, "BREAKING NEWS", at, cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
    return captioned


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of real shots: still, moving, covered with text, and a duplicate."""
    folder, shots = tmp_path_factory.mktemp("graded"), real_shots()
    write_video(folder / "still.mp4", np.repeat(shots["street3"][:1], 50, axis=0), fps=25)
    write_video(folder / "moving.mp4", shots["street2"], fps=25)
    write_video(folder / "street.mp4", shots["street4"], fps=25)
    write_video(folder / "text.mp4", add_text(shots["man"]), fps=25)
    write_video(folder / "original.mp4", shots["rabbit"], fps=25)
    smaller = [cv2.resize(frame, (192, 108), interpolation=cv2.INTER_AREA) for frame in shots["rabbit"]]
    write_video(folder / "repeat.mp4", np.stack(smaller), fps=25)
    return folder


def test_each_filter_removes_the_right_clips(
    curate: Callable[..., ToolResult], graded: Path, tmp_path: Path
) -> None:
    result = curate(graded, tmp_path, "--where", "motion>=0.01", "text_area<=0.07")
    assert result.code == 0, result.err
    assert "aesthetic: not measured, because no model was given" in result.err
    clips = {clip["video"]: clip for clip in read_clips(tmp_path).values()}
    assert {video for video, clip in clips.items() if clip["kept"]} == {
        "moving.mp4",
        "street.mp4",
        "original.mp4",
    }
    assert clips["still.mp4"]["reason"].startswith("motion>=0.01: ")
    assert (
        clips["text.mp4"]["reason"].startswith("text_area<=0.07: ") and clips["text.mp4"]["text_area"] > 0.2
    )
    assert clips["repeat.mp4"]["reason"] == "near-duplicate: of original-000000"
    assert all(clip["aesthetic"] is None and clip["clip_similarity"] is None for clip in clips.values())
    assert [sample.id for sample in Index.load(tmp_path / "shards").samples()] == [
        "moving-000000",
        "original-000000",
        "street-000000",
    ]
    card = (tmp_path / "report.html").read_text()
    for part in (
        "3 of 6",
        "motion&gt;=0.01",
        "near-duplicate",
        "data:image/jpeg;base64,",
        "<svg",
        "aesthetic",
    ):
        assert part in card
    assert "http://" not in card.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.slow
def test_changed_settings_repeat_only_the_stages_that_depend_on_them(
    curate: Callable[..., ToolResult], graded: Path, tmp_path: Path
) -> None:
    quick = ("--text-model", "none")
    assert curate(graded, tmp_path, *quick).code == 0
    stages = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*/*.parquet")}
    shard = (tmp_path / "shards" / "shard-00000.tar").stat().st_mtime_ns
    assert curate(graded, tmp_path, *quick).code == 0
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*/*.parquet")
    } == stages
    assert (tmp_path / "shards" / "shard-00000.tar").stat().st_mtime_ns == shard

    assert curate(graded, tmp_path, *quick, "--where", "motion>=q50").code == 0
    assert len(list((tmp_path / "stages").glob("*/*.parquet"))) == len(stages), (
        "new thresholds repeat no measure"
    )
    assert len(Index.load(tmp_path / "shards")) < 5
    assert curate(graded, tmp_path, *quick, "--size", 64).code == 0
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "stages").iterdir())
    assert folders == ["clips", "clips", "cuts", "hash", "hash", "motion", "motion", "probe"]
    assert {clip["height"] for clip in read_clips(tmp_path).values()} == {64}


def test_changed_and_new_files_are_processed(curate: Callable[..., ToolResult], tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_video(raw / "a.mp4", moving_square(50, speed=0.5), fps=25)
    assert curate(raw, out, "--text-model", "none").code == 0
    write_video(raw / "a.mp4", moving_square(75, speed=0.5), fps=25)
    write_video(raw / "b.mp4", moving_square(50, speed=0.5, seed=5), fps=25)
    assert curate(raw, out, "--text-model", "none").code == 0
    assert {name: clip["end_frame"] for name, clip in read_clips(out).items()} == {
        "a-000000": 75,
        "b-000000": 50,
    }


@pytest.mark.slow
def test_parts_may_run_twice_and_give_the_result_of_one_machine(
    curate: Callable[..., ToolResult], graded: Path, tmp_path: Path
) -> None:
    quick = ("--text-model", "none", "--where", "motion>=q25")
    for number in (1, 0, 1):
        result = curate(graded, tmp_path / "parts", *quick, "--part", f"{number}/2")
        assert result.code == 0 and f"part {number}/2 is done, 3 of 6 files" in result.out
    assert not (tmp_path / "parts" / "shards").exists()
    before = sorted((tmp_path / "parts" / "stages").glob("*/*.parquet"))
    assert curate(graded, tmp_path / "parts", *quick).code == 0
    assert sorted((tmp_path / "parts" / "stages").glob("*/*.parquet")) == before, "nothing is left to do"
    assert curate(graded, tmp_path / "single", *quick).code == 0
    for name in ("clips.parquet", "refused.csv", "shards/shard-00000.tar", "shards/index.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()


@pytest.mark.slow
def test_killed_run_is_resumed(graded: Path, tmp_path: Path) -> None:
    """The run is killed while files are cut."""
    command = [
        sys.executable,
        str(TOOL),
        str(graded),
        str(tmp_path / "out"),
        "--text-model",
        "none",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list((tmp_path / "out").glob("stages/cuts-*/*.parquet")):
        pass
    workers = psutil.Process(process.pid).children(recursive=True)
    assert process.poll() is None and len(workers) >= 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == [], "workers end with the run"
    assert not (tmp_path / "out" / "clips.parquet").exists()
    fragments = {path: path.read_bytes() for path in (tmp_path / "out").glob("stages/*/*.parquet")}
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert len(read_clips(tmp_path / "out")) == 6
    assert fragments
    assert all(path.read_bytes() == content for path, content in fragments.items())


@pytest.mark.slow
def test_subsets_are_configs_that_training_accepts(
    curate: Callable[..., ToolResult], graded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert curate("sweep-thresholds", out).code == 2
    assert curate(graded, out, "--text-model", "none", "--keep-duplicates").code == 0
    result = curate("sweep-thresholds", out)
    assert result.code == 0 and "text_area: no subsets, because no clip has it" in result.err
    configs = sorted(path.stem for path in (out / "thresholds" / "subset").iterdir())
    assert configs == ["motion-12.5", "motion-25", "motion-50", "none"]
    assert "+subset=motion-50: 3 clips" in result.out and "+subset=none: 6 clips" in result.out
    index = Index.load(out / "shards")
    assert sum(map(select_samples(["motion>=q50"], index), index.samples())) == 3

    command = (
        f"-m svd_ds.train --config-dir {out}/thresholds +experiment=curation +subset=motion-50 --cfg job"
    )
    composed = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert composed.returncode == 0, composed.stderr
    assert "- motion>=q50\n" in composed.stdout and "name: curation-motion-50" in composed.stdout
    assert f"path: {out / 'shards'}" in composed.stdout and "aesthetic" not in composed.stdout

    assert curate(graded, out, "--text-model", "none", "--where", "motion>=q50").code == 0
    result = curate("sweep-thresholds", out)
    assert result.code == 2 and "because of conditions like 'motion>=q50'" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out"), "there is no folder or manifest (.txt) nowhere"),
        ((".", "out", "--shortest", "2m"), "'2m' is neither a number of frames (48) nor of seconds (2s)"),
        ((".", "out", "--size", "-1"), "--size is -1: it must be at least 0"),
        ((".", "out", "--timeout", "0"), "--timeout is 0.0: it must be at least 0.1"),
        ((".", "out", "--aesthetic", "head.pth"), "give --clip FOLDER too"),
        ((".", "out", "--llm", "folder"), "llm merges the captions of coca and video_blip"),
        (("graded", "out", "--where", "motion=1"), "--where has 'motion=1', which is not a condition"),
        (("graded", "out", "--where", "aesthetic>=q25"), "asks for aesthetic, which no clip has"),
        (("graded", "out", "--where", "motion>=9"), "none of the 1 clips is kept"),
        (("graded", "out", "--clip", "nowhere"), "nowhere holds no model: it has no config.json"),
    ],
)
def test_mistakes_end_in_one_sentence(
    curate: Callable[..., ToolResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "graded" / "a.mp4", moving_square(50), fps=25)
    result = curate(*arguments, "--text-model", "none")
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err
