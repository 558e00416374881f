"""tools/sample.py with the shipped tiny weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import av
import pytest
import yaml
from PIL import Image

from svd_ds.model.conditioner import ConditionerConfig
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.sample import TINY, SampleConfig
from svd_ds.weights.io import save_unet


@pytest.fixture
def run(run_tool: Callable[..., int]) -> Callable[..., int]:
    return partial(run_tool, "sample.py")


def test_each_image_gives_a_video(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{name}.png")
    images = [tmp_path / "red.png", tmp_path / "blue.png"]
    sizes = ["--frames", 2, "--size", "16x24", "--steps", 1]
    assert run(TINY, "--image", *images, "--out", tmp_path / "out", *sizes) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["0-red.mp4", "1-blue.mp4", "contact_sheet.png"]
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2 * 26 - 2, 2 * 18 - 2)
    assert "wrote 2 videos" in capsys.readouterr().out


def write_interpolation_run(folder: Path) -> Path:
    """Write the files that sampling reads of a checkpoint of a network that interpolates 4 frames."""
    config = UNetConfig(
        in_channels=9,
        masked=True,
        widths=(32,),
        attention_levels=(True,),
        num_layers=1,
        context_width=64,
        head_width=32,
        scalar_width=32,
    )
    save_unet(UNet(config), folder / "checkpoints" / "step-0000001")
    conditioning = asdict(ConditionerConfig(context="ends", concat="ends"))
    settings = {
        "frozen": {"path": "tiny"},
        "conditioning": conditioning | {"scalars": list(conditioning["scalars"])},
        "data": {"num_frames": 4, "height": 16, "width": 24},
        "sampling": asdict(SampleConfig(fps=9.0)),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "checkpoints" / "step-0000001"


def test_two_images_are_interpolated(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = write_interpolation_run(tmp_path / "run")
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(red)
    Image.new("RGB", (50, 40), (30, 30, 200)).save(blue)
    out = ["--out", tmp_path / "out", "--steps", 1]
    assert run(run_folder, "--image", red, "--last-image", blue, *out) == 0
    with av.open(str(tmp_path / "out" / "0-red.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
        assert container.streams.video[0].average_rate == 9, "the frame rate of the run's previews"
    converted = shutil.copytree(run_folder, tmp_path / "converted")
    options = ["--frozen", "tiny", "--size", "16x24", "--frames", 3, *out]
    assert run(converted, "--image", red, "--last-image", blue, *options) == 0, "its channels show the task"
    for arguments, message in (
        (["--image", red], "needs --image and --last-image"),
        (["--image", red, blue, "--last-image", red], "2 with --image and 1 with --last-image"),
        (
            ["--image", red, "--last-image", blue, "--frames", 2],
            "num_frames is 2: with the first and the last frame given it must be at least 3",
        ),
        (["--image", red, "--last-image", blue, "--caption", "a boat"], "takes no --caption"),
    ):
        assert run(run_folder, *arguments, *out) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "a boat"], "needs --image"),
        (["--image", "nowhere.png"], "there is no image nowhere.png"),
        (["--image", "a.png", "--last-image", "b.png"], "takes no --last-image"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(TINY, *arguments, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
