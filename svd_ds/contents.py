"""Fingerprints of the weights at `frozen.path` and `init.from`.

A run resumes after these were moved, but not with other weights. The data at `data.path`, `data.mixture` and
`evaluation.path` have fingerprints in the cursor of each checkpoint and in the rows of evaluation.jsonl.
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
"""Context -> parts of the pipeline that compute it."""
SAMPLE = 64
"""Elements of a vector that enter its fingerprint; of a matrix the first row does."""


def contents_of(config: RunConfig, begun: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compute the fingerprints, the section `contents` of config.yaml.

    Args:
        begun: config.yaml of a run that resumes. Its initial weights may be gone by now, or trained further:
            if `init.from` is unchanged, their fingerprint is taken from there.
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
        # The error is reported where the weights are loaded.
        return NOTHING


def source_fingerprint(source: WeightSource) -> str:
    """Hash name, shape and first elements of each tensor, without loading it, into 12 hexadecimal digits."""
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
                digest.update(_first_elements(leaf))
    return digest.hexdigest()[:12]


def _first_elements(piece: TensorRef) -> bytes:
    if not piece.shape:
        numbers = piece.read().reshape(1)
    else:
        numbers = piece.file.get_slice(piece.name)[: 1 if len(piece.shape) > 1 else SAMPLE]
    return bytes(numbers.contiguous().view(torch.uint8).numpy())
