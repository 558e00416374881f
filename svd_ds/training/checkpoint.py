"""Checkpoints that a killed run can trust: written under a temporary name, made durable, then renamed.

    checkpoints/step-0000100/
        COMPLETE            the marker: without it the folder does not count
        state.json          Progress
        engine/             DeepSpeed's ZeRO-3 shards: weights, master weights, optimiser state
        objective.safetensors    what the objective keeps, where it keeps anything: a discriminator
        unet/config.json    UNetConfig, and lora.json where adapters are trained; decoder/ where that is
        unet/rank-00000-of-00002.safetensors          this rank's slices of the weights, frozen ones too
        ema-power-0.050/rank-00000-of-00002.safetensors    and of each average of those that are trained

A slice is flat float32: the ranks' slices joined in order, cut to the parameter's size and reshaped, give the
parameter. So weights and averages are read (svd_ds.model.weights) without DeepSpeed, on any number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from svd_ds.model.slices import KEPT_AVERAGES, network_of
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env, barrier
from svd_ds.training.ema import ShardEMA
from svd_ds.training.folder import step_name
from svd_ds.training.objective import Objective
from svd_ds.training.state import Progress

MARKER = "COMPLETE"
OBJECTIVE = "objective.safetensors"
Settings = Mapping[str, Mapping[str, Any]]
"""The files beside a network's weights, by name: config.json, and lora.json where adapters are trained."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = 2
    """How many of the newest stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0 keeps none for good."""
    keep_averages: int = 0
    """Of those at multiples of this many steps the averages stay, in averages/step-N: any other length can be
    made of them after the run. 0 keeps none."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1:
            raise ValueError(
                f"checkpoint.every is {self.every} and checkpoint.keep_last {self.keep_last}: both must be "
                "at least 1"
            )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, seen from one rank."""

    folder: Path
    config: CheckpointConfig
    env: Env
    network: str
    """What the run trains, unet or decoder: the name of the weights' folder."""

    def complete(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint that was finished, oldest first."""
        found = {
            int(match[1]): path
            for path in (self.folder.iterdir() if self.folder.exists() else ())
            if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / MARKER).exists()
        }
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        return next(reversed(self.complete().values()), None)

    def save(
        self, progress: Progress, engine: Engine, ema: ShardEMA, objective: Objective, settings: Settings
    ) -> None:
        """Write one checkpoint. All ranks call it; an error on any leaves the earlier ones untouched."""
        final = self.folder / step_name(progress.step)
        if (final / MARKER).exists():
            return
        draft = final.with_name(final.name + ".tmp")
        if self.env.rank == 0:
            for leftover in (*self.folder.glob("*.tmp"), final):
                shutil.rmtree(leftover, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        engine.save(draft / "engine")
        self._write_slices(draft / self.network, {**engine.local_shards(), **engine.frozen_shards()})
        for profile in ema.config.names:
            self._write_slices(draft / f"ema-{profile}", ema.shards(profile))
        if self.env.rank == 0:
            for name, values in settings.items():
                (draft / self.network / name).write_text(json.dumps(values, indent=1) + "\n")
            if state := objective.state():
                save_file(state, draft / OBJECTIVE)
            progress.write(draft / "state.json")
        barrier()
        if self.env.rank == 0:
            (draft / MARKER).touch()
            _make_durable(draft)
            os.replace(draft, final)
            _sync(self.folder)
            self._prune()
        barrier()

    def check_network(self, path: Path) -> None:
        """Raises ValueError where a checkpoint holds another network than the run trains."""
        held = network_of(path)
        if held != self.network:
            raise ValueError(f"{path} is a checkpoint of a {held}, and this run trains a {self.network}")

    def load(self, path: Path, engine: Engine, ema: ShardEMA, objective: Objective) -> Progress:
        """Put a checkpoint of the same number of ranks into the engine, the averages and the objective."""
        ranks = len(list((path / self.network).glob("rank-*.safetensors")))
        if ranks != self.env.world:
            raise ValueError(
                f"checkpoint {path} was saved by {ranks} ranks and this run has {self.env.world}: start as "
                "many ranks"
            )
        engine.load(path / "engine")
        for profile in ema.config.names:
            ema.load(profile, load_file(path / f"ema-{profile}" / self._slice_name()))
        if (path / OBJECTIVE).exists():
            objective.load_state(load_file(path / OBJECTIVE))
        return Progress.read(path / "state.json")

    def _slice_name(self) -> str:
        return f"rank-{self.env.rank:05d}-of-{self.env.world:05d}.safetensors"

    def _write_slices(self, folder: Path, slices: Mapping[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        save_file(
            {name: value.detach().contiguous() for name, value in slices.items()}, folder / self._slice_name()
        )

    def _prune(self) -> None:
        complete = self.complete()
        for step, path in list(complete.items())[: -self.config.keep_last]:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                # The marker goes first: a prune that is cut short leaves nothing that looks whole.
                (path / MARKER).unlink()
                if self.config.keep_averages and step % self.config.keep_averages == 0:
                    _keep_averages(path, self.folder.parent / KEPT_AVERAGES / path.name)
                shutil.rmtree(path)


def _keep_averages(checkpoint: Path, kept: Path) -> None:
    """Move the power-function averages, of which others can be made; state.json last, as their marker."""
    # One may be there since before the run went on from an earlier step.
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in (*(folder.name for folder in checkpoint.glob("ema-power-*")), "state.json"):
        os.replace(checkpoint / name, kept / name)


def _make_durable(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
