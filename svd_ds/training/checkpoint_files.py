"""What the files of a checkpoint hold: from the parts of a run to files, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.small_files import read_json
from svd_ds.training.ema import ShardEMA
from svd_ds.training.objectives.base import Objective
from svd_ds.training.progress import Progress
from svd_ds.weights.shards import WeightShards, rank_file_name

OBJECTIVE = "objective.safetensors"
ADAM = "adam.json"
STATE = "state.json"
Settings = Mapping[str, Mapping[str, Any]]
"""The files beside a network's weights, by name: config.json, and lora.json where adapters are trained."""


def own_tensors(network: str, env: Env, engine: Engine, ema: ShardEMA) -> dict[str, Mapping[str, Tensor]]:
    """This rank's files of slices: weights, moments and averages, by their names inside the checkpoint."""
    slices: dict[str, Mapping[str, Tensor]] = {
        network: {**engine.local_shards(), **engine.frozen_shards()},
        **{f"adam-{moment}": shards for moment, shards in engine.moments().items()},
        **{f"ema-{profile}": ema.shards(profile) for profile in ema.config.names},
    }
    own = rank_file_name(env.rank, env.world)
    return {f"{folder}/{own}": values for folder, values in slices.items()}


def shared_files(
    network: str, progress: Progress, engine: Engine, objective: Objective, settings: Settings
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
    """The files that rank 0 writes for all: tensors of the objective where it keeps any, and texts."""
    state = objective.state()
    tensors: dict[str, Mapping[str, Tensor]] = {OBJECTIVE: state} if state else {}
    texts = {f"{network}/{name}": _json(values) for name, values in settings.items()}
    return tensors, texts | {STATE: progress.as_json(), ADAM: _json({"updates": engine.updates})}


def elements_of(env: Env, engine: Engine) -> dict[str, int]:
    """Parameter -> how many elements of this rank's slice are its own, and not padding beyond its end."""
    return {
        name: shape.numel() - env.rank * -(-shape.numel() // env.world)
        for name, shape in engine.shapes.items()
    }


def read_files(
    path: Path, network: str, env: Env, engine: Engine, ema: ShardEMA, objective: Objective
) -> Progress:
    """Put a checkpoint of any number of ranks into the engine, the averages and the objective."""
    engine.load_shards(_own_slices(path / network, env, engine, engine.shapes))
    for moment, shards in engine.moments().items():
        for name, values in _own_slices(path / f"adam-{moment}", env, engine, shards):
            shards[name].copy_(values)
    engine.updates = read_json(path / ADAM)["updates"]
    for profile in ema.config.names:
        ema.load(profile, dict(_own_slices(path / f"ema-{profile}", env, engine, ema.names)))
    if (path / OBJECTIVE).exists():
        objective.load_state(load_file(path / OBJECTIVE))
    return Progress.read(path / STATE)


def _own_slices(folder: Path, env: Env, engine: Engine, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """This rank's slice of each parameter, whoever wrote it."""
    files = WeightShards(folder)
    for name in names:
        numel = engine.shapes[name].numel()
        each = -(-numel // env.world)
        yield name, files.read(name, numel, env.rank * each, (env.rank + 1) * each)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
