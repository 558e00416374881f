"""tools/sample.py from the command line, with the shipped tiny weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from svd_ds.sample import TINY

TOOL = Path(__file__).parents[3] / "tools" / "sample.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_images_become_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{name}.png")
    images = [tmp_path / "red.png", tmp_path / "blue.png"]
    sizes = ["--frames", 2, "--size", "16x24", "--steps", 1]
    assert run(monkeypatch, TINY, "--image", *images, "--out", tmp_path / "out", *sizes) == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["0-red.mp4", "1-blue.mp4", "contact_sheet.png"]
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2 * 26 - 2, 2 * 18 - 2)
    assert "wrote 2 videos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--caption", "a boat"], "conditioned on what you give with --image"),
        (["--image", "nowhere.png"], "there is no image nowhere.png"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert run(monkeypatch, TINY, *arguments, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
