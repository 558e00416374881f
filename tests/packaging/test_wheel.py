"""The package as users install it: not editable, used from a folder outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.videos import moving_square

ROOT = Path(__file__).parents[2]
PARTS = ("svd_ds", "conf", "sweeps", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = ["debug=tiny", "run.steps=2", "sampling.every=2", "batch.size=2", "evaluation.clips=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: builds in the repository would leave files that later wheels take."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        part = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        if part.is_dir():
            shutil.copytree(part, source / name, ignore=ignore)
        else:
            shutil.copy(part, source / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([sys.executable, *build, str(out), str(source)], check=True, timeout=250)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel in it. Its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *install, str(wheel)], check=True, timeout=250)
    # A path in a .pth file: the .pth files there, such as that of an editable svd_ds, are not read.
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def run_command(installed: Path, folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    program, *arguments = command
    ended = subprocess.run(
        [str(installed / program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_wheel_has_configs_tools_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "svd_ds/py.typed",
        "svd_ds/conf/train.yaml",
        "svd_ds/conf/noise/edm.yaml",
        "svd_ds/tools/sample.py",
        "svd_ds/tools/tiny/stage_inputs.py",
        "svd_ds/sweeps/lr.yaml",
        "svd_ds/assets/tiny_svd/vae/config.json",
    ):
        assert needed in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"svd_ds"}


def test_installed_package_trains_samples_and_reports(installed: Path, folder: Path) -> None:
    home = run_command(installed, folder, "python", "-c", "import svd_ds; print(svd_ds.__file__)")
    assert home.startswith(str(installed.parent)), "the repository's own is not used"
    run_command(installed, folder, "svd-ds", "make-shards", "--quickstart", "data/quickstart")
    run_command(installed, folder, "python", "-m", "svd_ds.train", *SMALL, "run.dir=runs/one")
    run_command(installed, folder, "svd-ds", "launch", "-n", "2", "--", *SMALL, "run.dir=runs/two")
    Image.fromarray(moving_square(1, height=64, width=64)[0]).save(folder / "frame.png")
    sample = ("runs/one", "--image", "frame.png", "--steps", "2", "--out", "samples")
    run_command(installed, folder, "svd-ds", "sample", *sample)
    assert (folder / "samples" / "contact_sheet.png").is_file()
    run_command(installed, folder, "svd-ds", "report", "runs/one", "runs/two", "--out", "report.html")
    assert (folder / "report.html").stat().st_size > 10_000


def test_console_script_lists_commands_and_explains_keys(installed: Path, folder: Path) -> None:
    assert "make-shards" in run_command(installed, folder, "svd-ds")
    assert "optimiser step" in run_command(installed, folder, "svd-ds", "train", "--help", "batch.size")
