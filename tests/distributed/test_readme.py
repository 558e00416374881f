"""The commands of README.md and docs/index.md, with settings that make them small."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.videos import moving_square, write_video

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "docs" / "index.md").read_text()
SMALL = ["debug=tiny", "run.steps=2", "sampling.every=2", "batch.size=4", "evaluation.clips=1"]


def commands(page: str) -> list[str]:
    """Return the Python commands of a page's bash blocks, except those with a placeholder in capitals."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ") and not re.search(r"=[A-Z]{3,}", line)]


COMMANDS = list(dict.fromkeys([*commands(README), *commands(INDEX)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working folder: the repository's files, and what the commands name."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("tools", "svd_ds", "conf"):
        (folder / name).symlink_to(ROOT / name)
    quickstart = ["python", "tools/make_shards.py", "--quickstart", "data/quickstart"]
    assert run_command(quickstart, folder).returncode == 0
    Image.fromarray(moving_square(1, height=64, width=64)[0]).save(folder / "frame.png")
    write_video(folder / "my_videos" / "square.mp4", moving_square(48, height=160, width=160))
    write_video(folder / "footage" / "square.mp4", moving_square(96, height=160, width=160))
    return folder


def run_command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def with_tiny_settings(words: list[str]) -> list[str]:
    """Add the settings of the tiny model; runs keep the folder that later commands name."""
    if "svd_ds.train" in words or "tools/launch.py" in words:
        named = any(word.startswith(("run.dir=", "+experiment=")) for word in words)
        return [*words, *SMALL, *([] if named else ["run.dir=runs/small"])]
    return [*words, "--steps", "2"] if "tools/sample.py" in words else words


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_in_order(folder: Path, command: str) -> None:
    ended = run_command(with_tiny_settings(shlex.split(command)), folder)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_readme_commands_write_their_outputs(folder: Path) -> None:
    assert (folder / "samples").is_dir(), "tools/sample.py"
    assert (folder / "report.html").stat().st_size > 10_000, "tools/report.py"
    assert (folder / "data" / "mine" / "index.jsonl").exists(), "tools/make_shards.py"
    assert (folder / "data" / "mine-latents" / "index.jsonl").exists(), "tools/encode.py"
    assert (folder / "data" / "footage" / "shards" / "index.jsonl").exists(), "tools/curate.py"
    assert (folder / "pipeline" / "model_index.json").exists(), "tools/convert.py"
    assert (folder / "runs" / "mine" / "checkpoints" / "step-0000002" / "COMPLETE").exists(), (
        "tools/launch.py"
    )


@pytest.mark.slow
def test_readme_python_example_runs(folder: Path) -> None:
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        ended = run_command(["python", "-c", example], folder)
        assert ended.returncode == 0, ended.stderr
    assert (folder / "out" / "config.json").exists()
