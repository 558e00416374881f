"""Fingerprints of what a run reads at `frozen.path` and `init.from`: it resumes where these were moved, and
not with others. What stands at `data.path`, `data.mixture` and `evaluation.path` has fingerprints in the
cursor of each checkpoint and in the rows of evaluation.jsonl.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svd_ds.config import RunConfig
from svd_ds.model.frozen import fingerprint
from svd_ds.sample import frozen_folder
from svd_ds.tensor_files import TensorRef
from svd_ds.weights.shards import WeightedSum
from svd_ds.weights.source import WeightSource, open_weights

NOTHING = "none"
ENCODERS = {"image": ("image_encoder",), "ends": ("image_encoder",), "text": ("text_encoder",)}
"""Context -> the parts of a pipeline that make it."""
SAMPLE = 64
"""Numbers of a vector that count in its fingerprint; of a matrix its first row counts."""


def contents_of(config: RunConfig, begun: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.yaml says of them, as its section `contents`.

    Args:
        begun: config.yaml of the run, where it has begun. Weights that a run has started from may be gone, or
            trained further, when it resumes: at the place that is written there they are not read again.
    """
    path = frozen_folder(config.frozen.path)
    parts = ("vae", *ENCODERS.get(config.conditioning.context, ())) if config.task == "unet" else ("vae",)
    frozen = {part: found for part in parts if (found := fingerprint(path, part)) is not None}
    return {"frozen": {"path": frozen}, "init": {"from": _initial(config, begun or {})}}


def _initial(config: RunConfig, begun: Mapping[str, Any]) -> str:
    if config.init.source is None:
        return NOTHING
    if begun.get("init") == {"from": config.init.source, "which": config.init.which}:
        known = begun.get("contents", {}).get("init", {}).get("from")
        if known is not None:
            return str(known)
    try:
        return source_fingerprint(open_weights(Path(config.init.source), config.init.which))
    except (OSError, ValueError):
        # Where it is read, the error is told.
        return NOTHING


def source_fingerprint(source: WeightSource) -> str:
    """12 hexadecimal digits that name weights, without loading them: of each tensor its name, its shape and
    its first numbers."""
    digest = hashlib.sha256()
    for name in sorted(source.tensor_refs):
        for piece in source.tensor_refs[name]:
            leaves: list[TensorRef]
            if isinstance(piece, WeightedSum):
                digest.update(f"{piece.weights}".encode())
                leaves = [leaf for parameter in piece.parameters for leaf in parameter]
            else:
                leaves = [piece]
            for leaf in leaves:
                digest.update(f"{name} {leaf.name} {leaf.shape}\n".encode())
                digest.update(_first_numbers(leaf))
    return digest.hexdigest()[:12]


def _first_numbers(piece: TensorRef) -> bytes:
    if not piece.shape:
        numbers = piece.read().reshape(1)
    else:
        numbers = piece.file.get_slice(piece.name)[: 1 if len(piece.shape) > 1 else SAMPLE]
    return bytes(numbers.contiguous().view(torch.uint8).numpy())
