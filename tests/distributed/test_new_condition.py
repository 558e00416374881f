"""A new scalar condition needs one registration and one file of conf/conditioning/: docs/conditioning.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from svd_ds.weights.io import load_unet
from tests.runs import metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REGISTRATION = """
import runpy, sys
from svd_ds.scalars import Scalar, register

register(Scalar("zoom", low=0.5, high=4, unit="times", sample_field="zoom", sampling_default=1.0))

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
WRITING = """
import sys
from pathlib import Path
from svd_ds.data.writer import ShardWriter
from tests.videos import encode, moving_square, sample_metadata

for name, zooms in (("shards", [1.0, 1.5, 2.0, 2.5]), ("lacking", [1.0, None, 2.0, 2.5])):
    writer = ShardWriter(Path(sys.argv[1], name))
    for i, zoom in enumerate(zooms):
        frames = moving_square(8, height=64, width=80, seed=i)
        fields = {} if zoom is None else {"zoom": zoom}
        metadata = sample_metadata(frames, motion=0.01 * (i + 1), **fields)
        writer.add(f"clip{i}", "mp4", encode(frames), metadata)
    writer.close()
"""
CONFIG = """
defaults: [image_to_video, _self_]
scalars: [fps, motion_bucket, augmentation, zoom]
drop_scalars: {zoom: 0.1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registration, a --config-dir, and shards whose samples have the field, all but one."""
    path = tmp_path_factory.mktemp("zoom")
    (path / "zoom.py").write_text(REGISTRATION)
    (path / "conf" / "conditioning").mkdir(parents=True)
    (path / "conf" / "conditioning" / "zoom.yaml").write_text(CONFIG)
    (path / "write.py").write_text(WRITING)
    written = start(path, str(path / "write.py"), str(path))
    assert written.returncode == 0, written.stderr
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path / "red.png")
    return path


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "zoom.py"), *words]
    return subprocess.run(
        command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True, timeout=280
    )


def train(folder: Path, shards: str, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    settings = [f"data.path={folder / shards}", f"run.dir={folder / run}", "run.steps=2", "batch.size=2"]
    settings += ["evaluation.clips=1", "precision=fp32", "conditioning=zoom", "debug=tiny", *words]
    return start(folder, "svd_ds.train", "--config-dir", str(folder / "conf"), *settings)


def test_new_scalar_takes_one_registration_and_one_yaml(folder: Path) -> None:
    done = train(folder, "shards", "run")
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    assert [row["step"] for row in metrics(run)] == [1, 2]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["num_scalars"] == 4 and settings["conditioning"]["drop_scalars"] == {"zoom": 0.1}
    row = json.loads((folder / "shards" / "index.jsonl").read_text().splitlines()[2])
    assert row["zoom"] == 1.5
    assert load_unet(run).config.num_scalars == 4
    assert list(run.glob("samples/step-0000002/video-0.mp4")), "the preview samples with the default"

    tool = ["tools/sample.py", str(run), "--image", str(folder / "red.png"), "--steps", "1"]
    for zoom in ("1", "3"):
        sampled = start(folder, *tool, "--out", str(folder / zoom), "--scalar", f"zoom={zoom}")
        assert sampled.returncode == 0, sampled.stderr
    assert (folder / "1" / "0-red.mp4").read_bytes() != (folder / "3" / "0-red.mp4").read_bytes()
    for words, sentence in (
        ("zoom=9", "sampling.scalars.zoom is 9.0: it must be at least 0.5 and at most 4"),
        ("pan=1", "sampling.scalars names pan: it must be one of elevation, zoom"),
        ("elevation=1", f"{run} takes no scalar elevation; it takes fps, motion_bucket, augmentation, zoom"),
    ):
        refused = start(folder, *tool, "--out", str(folder / "refused"), "--scalar", words)
        assert refused.returncode == 2 and sentence in refused.stderr


def test_missing_and_unknown_values_are_refused_in_one_sentence(folder: Path) -> None:
    lacking = folder / "lacking"
    for shards, words, sentence in (
        (
            "lacking",
            (),
            f"conditioning.scalars names zoom, which sample clip1 in {lacking} does not have: its json needs "
            'the key "zoom", in times',
        ),
        ("shards", ("sampling.scalars.zoom=9",), "sampling.scalars.zoom is 9.0: it must be at least 0.5"),
        (
            "shards",
            ("sampling.scalars.pan=1",),
            "sampling.scalars names pan: it must be one of elevation, zoom",
        ),
        (
            "shards",
            ("conditioning.scalars=[fps,pan]",),
            "conditioning.scalars[1] is 'pan': it must be one of fps",
        ),
        (
            "shards",
            ("conditioning.drop_scalars.pan=0.1",),
            "conditioning.drop_scalars names pan: it must be one",
        ),
    ):
        refused = train(folder, shards, "refused", *words)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
