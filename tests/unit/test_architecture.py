"""The layers of svd_ds: which part may import which, and the one module that imports each engine."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "svd_ds"

LAYERS = {
    "batch": 0,
    "cli": 0,
    "command_line": 0,
    "credentials": 0,
    "fsync_io": 0,
    "json_lines": 0,
    "overrides": 0,
    "package_files": 0,
    "pixels": 0,
    "run_folder": 0,
    "scalars": 0,
    "settings": 0,
    "small_files": 0,
    "tensor_files": 0,
    "video": 0,
    "commands": 1,
    "data": 1,
    "diffusion": 1,
    "model": 1,
    "parallel": 1,
    "weights": 1,
    "curate": 2,
    "encoding": 2,
    "sample": 2,
    "evaluation": 3,
    "jobs": 3,
    "training": 3,
    "training.objectives": 3,
    "config": 4,
    "checks": 5,
    "compose": 5,
    "contents": 5,
    "config_reference": 6,
    "inputs": 6,
    "plan": 7,
    "run_summary": 7,
    "tasks": 7,
    "run": 8,
    "train": 9,
}
"""A part of svd_ds imports from lower layers and from itself."""
SAME_LAYER = {
    "batch": {"scalars"},
    "cli": {"credentials"},
    "command_line": {"package_files"},
    "json_lines": {"fsync_io", "small_files"},
    "overrides": {"credentials", "settings"},
    "pixels": {"small_files"},
    "plan": {"tasks"},
    "run_folder": {"credentials", "fsync_io", "json_lines", "small_files"},
    "settings": {"credentials"},
    "training": {"jobs", "training.objectives"},
    "tensor_files": {"small_files"},
    "video": {"pixels"},
    "weights": {"model"},
}
"""Parts of its own layer that a part may import."""
ONLY_IMPORT_OF = {
    "deepspeed": {"svd_ds/parallel/engine.py", "svd_ds/parallel/zero_host_cost.py"},
    "flash_attn": {"svd_ds/model/ops/attention.py"},
    "flash_attn_interface": {"svd_ds/model/ops/attention.py"},
    "megatron": {"svd_ds/parallel/groups.py"},
    "omegaconf": {"svd_ds/compose.py"},
    "triton": {"svd_ds/model/ops/kernels.py"},
    # tools/sweep.py extends W&B's sweep agent, which runs outside of any run.
    "wandb": {"svd_ds/training/tracker.py", "tools/sweep.py"},
    "webdataset": {"svd_ds/data/loader.py"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "tools").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    """Module name of a file: svd_ds/model/unet.py -> svd_ds.model.unet."""
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part(module: str) -> str | None:
    """Entry of LAYERS that a module belongs to, None for svd_ds/__init__.py itself.

    svd_ds.training.objectives.base -> training.objectives; svd_ds.batch -> batch
    """
    names = module.split(".")[1:]
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYERS), None)


def imports(tree: ast.AST) -> set[str]:
    """Full name of everything that the code imports: svd_ds.batch.Clip, torch.nn, ..."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()))


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_layers_list_exactly_the_existing_parts() -> None:
    assert len(MODULES) > 100 and len(SCRIPTS) > 20
    assert {part(dotted(path)) for path in MODULES if path != PACKAGE / "__init__.py"} == LAYERS.keys()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_only_from_lower_layers(path: Path) -> None:
    here = part(dotted(path))
    if path == PACKAGE / "__init__.py":
        return  # It re-exports.
    assert here is not None, f"{relative(path)} is on no layer: add it to LAYERS and to docs/design.md"
    for name in imported(path):
        if name.split(".")[0] != "svd_ds":
            continue
        there = part(name)
        assert there is not None, f"{relative(path)} imports {name}: import from its own module"
        allowed = LAYERS[there] < LAYERS[here] or there == here or there in SAME_LAYER.get(here, ())
        assert allowed, f"{relative(path)} (layer {LAYERS[here]}) imports {name} (layer {LAYERS[there]})"


def test_exceptions_are_within_one_layer_used_and_without_cycles() -> None:
    used: dict[str, set[str]] = {}
    for path in MODULES:
        here = part(dotted(path))
        for name in imported(path) if here else ():
            if name.startswith("svd_ds.") and (there := part(name)) and there != here:
                used.setdefault(here or "", set()).add(there)
    for here, others in SAME_LAYER.items():
        assert {LAYERS[there] for there in others} == {LAYERS[here]}, here
        assert others <= used[here], f"{here} no longer imports all of {sorted(others)}"
    graphlib.TopologicalSorter(SAME_LAYER).prepare()


def test_modules_import_each_other_without_cycles() -> None:
    modules = {dotted(path): path for path in MODULES}
    graph = {
        name: {
            module
            for full in imported(path)
            for module in (full, full.rpartition(".")[0])
            if module in modules and module != name
        }
        for name, path in modules.items()
    }
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("engine", ONLY_IMPORT_OF)
def test_engine_is_imported_by_its_own_module_alone(engine: str) -> None:
    importers = {
        relative(path)
        for path in (*MODULES, *SCRIPTS)
        if any(name.split(".")[0] == engine for name in imported(path))
    }
    assert importers == ONLY_IMPORT_OF[engine]


def test_only_env_reads_the_launcher() -> None:
    readers = {
        relative(path)
        for path in MODULES
        if any(
            text in ("RANK", "WORLD_SIZE") or text.startswith("SLURM_")
            for text in strings(path)
            if " " not in text
        )
    }
    # devices.py asks only if Slurm has allocated GPUs.
    assert readers == {"svd_ds/parallel/env.py", "svd_ds/parallel/devices.py"}


@pytest.mark.parametrize("package", ["model", "diffusion"])
def test_networks_do_not_use_ranks_or_the_environment(package: str) -> None:
    paths = sorted((PACKAGE / package).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        names = imported(path)
        assert not any(name.startswith(("torch.distributed", "os.environ")) for name in names), path
        assert "environ" not in {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }, path


def test_diffusion_imports_only_torch_and_numpy() -> None:
    allowed = {"torch", "numpy", "svd_ds", *sys.stdlib_module_names}
    paths = sorted((PACKAGE / "diffusion").glob("*.py"))
    assert paths
    for path in paths:
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path
