"""The house keeps its shape: who may import whom, and where the foreign engines live."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "svd_ds"

FLOORS = {
    "credentials": -1,
    "fsync_io": -1,
    "small_files": -1,
    "svd_ds": 0,
    "allocator": 0,
    "batch": 0,
    "door": 0,
    "json_lines": 0,
    "pixels": 0,
    "settings": 0,
    "overrides": 1,
    "command_line": 1,
    "video": 1,
    "diffusion": 1,
    "model": 1,
    "data": 1,
    "curate": 2,
    "parallel": 1,
    "sample": 2,
    "encoding": 2,
    "plan": 2,
    "training": 3,
    "evaluation": 3,
    "config": 4,
    "compose": 5,
    "fit": 5,
    "contents": 5,
    "inputs": 6,
    "tasks": 7,
    "run": 8,
    "train": 9,
}
ONLY_HOME = {
    "deepspeed": "parallel/engine.py",
    "flash_attn": "model/ops/attention.py",
    "triton": "model/ops/kernels.py",
    "wandb": "training/tracker.py",
    "webdataset": "data/loader.py",
    "omegaconf": "compose.py",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of every module that the file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str:
    """svd_ds.model.unet -> model; svd_ds.batch -> batch; svd_ds -> svd_ds."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "svd_ds"


def home(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py").replace("__init__", "svd_ds")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(path: Path) -> None:
    here = home(path)
    assert here in FLOORS, f"{path} stands on no floor: give {here} one in FLOORS"
    if here == "svd_ds":
        return  # the package's own __init__ re-exports
    for name in imported(path):
        if name.startswith("svd_ds.") and (there := room(name)) != here:
            assert FLOORS[there] < FLOORS[here], f"{path} (floor {FLOORS[here]}) imports {name}"


@pytest.mark.parametrize("foreign", ONLY_HOME)
def test_foreign_engines_have_one_home(foreign: str) -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == foreign for name in imported(path))
    }
    assert importers <= {ONLY_HOME[foreign]}
    assert (PACKAGE / ONLY_HOME[foreign]).exists()


def test_only_env_reads_the_launcher() -> None:
    words = ("RANK", "WORLD_SIZE", "SLURM_")
    for path in MODULES:
        if path.relative_to(PACKAGE).as_posix() == "parallel/env.py":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value
        }
        assert not {text for text in strings if text in words or text.startswith("SLURM_")}, path


def test_networks_know_nothing_of_ranks() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        assert not any(name.startswith("torch.distributed") for name in imported(path)), path
