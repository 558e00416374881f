"""Files of a checkpoint: which component of a run is in which file, for saving and loading."""

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
NetworkSettings = Mapping[str, Mapping[str, Any]]
"""JSON files next to a network's weights, by name: config.json, and lora.json if adapters are trained."""


def rank_tensors(network: str, env: Env, engine: Engine, ema: ShardEMA) -> dict[str, Mapping[str, Tensor]]:
    """Collect this rank's shards of the weights, the optimiser's moments and the averages.

    Returns:
        File name inside the checkpoint -> parameter name -> flat float32 shard.
    """
    shards_by_folder: dict[str, Mapping[str, Tensor]] = {
        network: {**engine.local_shards(), **engine.frozen_shards()},
        **{f"adam-{moment}": shards for moment, shards in engine.moments().items()},
        **{f"ema-{profile}": ema.shards(profile) for profile in ema.config.names},
    }
    name = rank_file_name(env.rank, env.world)
    return {f"{folder}/{name}": shards for folder, shards in shards_by_folder.items()}


def shared_files(
    network: str, progress: Progress, engine: Engine, objective: Objective, settings: NetworkSettings
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
    """Collect the files that rank 0 writes for all ranks.

    Returns:
        Tensor files (the state of the objective, if it has one) and text files, by name in the checkpoint.
    """
    state = objective.state()
    tensors: dict[str, Mapping[str, Tensor]] = {OBJECTIVE: state} if state else {}
    texts = {f"{network}/{name}": _json(values) for name, values in settings.items()}
    return tensors, texts | {STATE: progress.as_json(), ADAM: _json({"updates": engine.updates})}


def num_valid_elements(env: Env, engine: Engine) -> dict[str, int]:
    """Return parameter name -> number of elements of this rank's shard before the padding; at most 0 if all
    of it is padding."""
    return {
        name: shape.numel() - env.rank * -(-shape.numel() // env.world)
        for name, shape in engine.shapes.items()
    }


def read_files(
    path: Path, network: str, env: Env, engine: Engine, ema: ShardEMA, objective: Objective
) -> Progress:
    """Load a checkpoint, saved by any number of ranks, into the engine, the averages and the objective."""
    engine.load_shards(_rank_shards(path / network, env, engine, engine.shapes))
    for moment, shards in engine.moments().items():
        for name, values in _rank_shards(path / f"adam-{moment}", env, engine, shards):
            shards[name].copy_(values)
    engine.updates = read_json(path / ADAM)["updates"]
    for profile in ema.config.names:
        ema.load(profile, dict(_rank_shards(path / f"ema-{profile}", env, engine, ema.names)))
    if (path / OBJECTIVE).exists():
        objective.load_state(load_file(path / OBJECTIVE))
    return Progress.read(path / STATE)


def _rank_shards(
    folder: Path, env: Env, engine: Engine, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and shard of each parameter for this rank, from files of any number of ranks."""
    files = WeightShards(folder)
    for name in names:
        numel = engine.shapes[name].numel()
        shard_size = -(-numel // env.world)
        yield name, files.read(name, numel, env.rank * shard_size, (env.rank + 1) * shard_size)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
