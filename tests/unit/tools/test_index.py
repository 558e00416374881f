"""tools/index.py from the command line: foreign shards that train where they are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from svd_ds.data.config import DataConfig
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index
from tests.unit.data.test_fuzz import picture
from tests.videos import counting, encode, moving_square


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def index(run_tool: Callable[..., int]) -> Callable[..., int]:
    return partial(run_tool, "index.py")


def test_foreign_shards_are_read_where_they_are(
    tmp_path: Path, index: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    moving, still = encode(moving_square(8, 32, 48)), encode(counting(8, 32, 48), suffix="matroska")
    write_tar(
        tmp_path / "a.tar",
        {
            "000.video.mp4": moving,
            "000.json": json.dumps({"caption": "it moves", "annotations": {"aesthetic": 5}}).encode(),
            "001.mkv": still,
            "001.txt": b"it stands ",
            "002.mp4": moving[:900],
            "002.txt": b"broken",
            "003.txt": b"no pixels",
            "004.mp4": b"text",
        },
    )
    write_tar(tmp_path / "sub" / "b.tar", {"x/000.png": picture(9, 8), "x/000.json": b"{}"})
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    assert index(tmp_path) == 0, capsys.readouterr().err
    found = Index.load(tmp_path)
    samples = {sample.id: sample for sample in found.samples()}
    assert list(samples) == ["a-000", "a-001", "sub_b-x_000"]
    video, stands, image = samples.values()
    assert (video.num_frames, video.fps, video.height, video.width) == (8, 24.0, 32, 48)
    assert video.motion > 10 * stands.motion and video.annotations == {"aesthetic": 5}
    assert (image.num_frames, image.fps, image.motion) == (1, 1.0, 0)
    told = (tmp_path / "refused.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in told] == ["sample", "a-002", "a-003", "a-004", ""]
    assert not (tmp_path / ".index-parts").exists()

    data = DataConfig(str(tmp_path), 4, 16, 16, fps=0, num_workers=0)
    batches = [batch for batch, _ in islice(Loader(data, 0, 0, 1, 2, 2), 2)]
    assert {text for batch in batches for text in batch.captions} == {"it moves", "it stands"}
    assert index(tmp_path) == 2 and "--overwrite it" in capsys.readouterr().err
    assert index(tmp_path, "--overwrite", "--no-motion") == 0
    assert {sample.motion for sample in Index.load(tmp_path).samples()} == {0}


def test_an_interrupted_index_goes_on(tmp_path: Path, index: Callable[..., int]) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"0.png": picture(1, 8), "0.txt": name.encode()})
    assert index(tmp_path) == 0
    (tmp_path / "index.jsonl").unlink()
    parts = tmp_path / ".index-parts"
    parts.mkdir()
    (parts / "000000.jsonl").write_text(
        json.dumps([False, {"id": "a-0", "shard": "a.tar", "cause": "seen"}]) + "\n"
    )
    assert index(tmp_path) == 0
    assert [sample.id for sample in Index.load(tmp_path).samples()] == ["b-0"], (
        "the first was not looked at again"
    )
