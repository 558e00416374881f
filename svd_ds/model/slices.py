"""Files of weights that a run saves: the ranks' slices of each parameter, and which of them is wanted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NETWORKS = ("unet", "decoder")
"""What a run may train, as its checkpoints call it."""
COMPLETE = "COMPLETE"
"""The file that a checkpoint gets last."""


@dataclass(frozen=True)
class Piece:
    """A tensor in an open file."""

    path: Path
    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def network_of(path: Path) -> str | None:
    """Which of NETWORKS a checkpoint, or a run's newest, holds; None where `path` is neither."""
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    return next((name for name in NETWORKS if any((path / name).glob("rank-*.safetensors"))), None)


def newest_checkpoint(run: Path) -> Path:
    """The last complete checkpoint of a run folder. ValueError where there is none."""
    complete = sorted(marker.parent for marker in run.glob(f"checkpoints/step-*/{COMPLETE}"))
    if not complete:
        raise ValueError(f"the run {run} has no complete checkpoint yet")
    return complete[-1]


def open_checkpoint(
    path: Path, network: str, which: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Piece]]]:
    """What a checkpoint, or a run's newest, says of its network, file by file; parameter -> its slices.

    Only what is trained has an average: with one, the other parameters are the weights' own.
    Raises ValueError where it is not complete, or lacks the average, or is of another network.
    """
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    if not (path / COMPLETE).exists():
        raise ValueError(f"the checkpoint {path} is not complete: it has no file {COMPLETE}")
    if (held := network_of(path)) != network:
        raise ValueError(f"{path} holds a {held}, and not a {network}")
    averages = sorted(folder.name.removeprefix("ema-") for folder in path.glob("ema-*"))
    which = which or next(iter(averages), "raw")
    if which not in ("raw", *averages):
        raise ValueError(f"the checkpoint {path} has {', '.join(['raw', *averages])}, and no {which!r}")
    pieces = _slices_of(path / network)
    if which != "raw":
        pieces |= _slices_of(path / f"ema-{which}")
    settings = {file.name: json.loads(file.read_text()) for file in (path / network).glob("*.json")}
    return settings, pieces


def join_slices(pieces: list[Piece], shape: torch.Size) -> Tensor:
    """The parameter of `shape` whose flat slices these are, the last of them padded."""
    return torch.cat([piece.read() for piece in pieces])[: shape.numel()].view(shape)


def tensors_of(path: Path) -> dict[str, Piece]:
    """Every tensor in a safetensors file, by name. ValueError where it is none."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    return {name: Piece(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _slices_of(folder: Path) -> dict[str, list[Piece]]:
    """Name -> the ranks' slices in order."""
    files = sorted(folder.glob("rank-*-of-*.safetensors"))
    ranks = int(files[0].stem.rpartition("-")[2]) if files else 0
    if not files or len(files) != ranks:
        raise ValueError(f"{folder} has the files of {len(files)} ranks out of {ranks}")
    pieces: dict[str, list[Piece]] = {}
    for file in files:
        for name, piece in tensors_of(file).items():
            pieces.setdefault(name, []).append(piece)
    return pieces
