"""The README's commands, followed to the letter but for their size."""

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
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("python ")]
SMALL = ["debug=tiny", "run.steps=2", "sampling.every=2", "batch.size=4", "evaluation.clips=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working folder: the repository's files, and what the commands name."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("tools", "svd_ds", "conf"):
        (folder / name).symlink_to(ROOT / name)
    quickstart = ["python", "tools/make_shards.py", "--quickstart", "data/quickstart"]
    assert follow(quickstart, folder).returncode == 0
    Image.fromarray(moving_square(1, height=64, width=64)[0]).save(folder / "frame.png")
    write_video(folder / "my_videos" / "square.mp4", moving_square(48, height=160, width=160))
    write_video(folder / "footage" / "square.mp4", moving_square(96, height=160, width=160))
    return folder


def follow(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def shrunk(words: list[str]) -> list[str]:
    """The same command on the tiny model; a run keeps the folder that later commands name."""
    if "svd_ds.train" in words or "tools/launch.py" in words:
        named = any(word.startswith(("run.dir=", "+experiment=")) for word in words)
        return [*words, *SMALL, *([] if named else ["run.dir=runs/small"])]
    return [*words, "--steps", "2"] if "tools/sample.py" in words else words


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_in_order(folder: Path, command: str) -> None:
    ended = follow(shrunk(shlex.split(command)), folder)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_commands_left_what_they_promise(folder: Path) -> None:
    assert (folder / "samples").is_dir(), "tools/sample.py"
    assert (folder / "report.html").stat().st_size > 10_000, "tools/report.py"
    assert (folder / "data" / "mine" / "index.jsonl").exists(), "tools/make_shards.py"
    assert (folder / "data" / "mine-latents" / "index.jsonl").exists(), "tools/encode.py"
    assert (folder / "data" / "footage" / "shards" / "index.jsonl").exists(), "tools/curate.py"
    assert (folder / "pipeline" / "model_index.json").exists(), "tools/convert.py"
    assert (folder / "runs" / "mine" / "checkpoints" / "step-0000002" / "COMPLETE").exists(), (
        "tools/launch.py"
    )


def test_make_targets_and_job_scripts_exist() -> None:
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"train", "test"} <= targets
    for target in targets:
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
    for line in LINES:
        if line.startswith("sbatch "):
            script = next(word for word in line.split() if word.endswith(".sh"))
            assert os.access(ROOT / script, os.X_OK), line
