"""Fingerprints of the weights at `frozen.path` and `init.from`.

A run can resume after its weights were moved, but not with other weights. The fingerprints of the data are
elsewhere: in the cursor of each checkpoint, and for `evaluation.path` in the rows of evaluation.jsonl.
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
"""Number of elements of a vector that are hashed; of a matrix the first row is hashed."""


def compute_contents(config: RunConfig, initial_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compute the fingerprints, which are the section `contents` of config.yaml.

    Args:
        initial_config: config.yaml of a run that resumes, else None. The weights at `init.from` may be gone
            by now, or trained further: if the key is unchanged, the fingerprint in this config is used.
    """
    path = frozen_folder(config.frozen.path)
    parts = ("vae", *ENCODERS.get(config.conditioning.context, ())) if config.task == "unet" else ("vae",)
    frozen = {part: found for part in parts if (found := fingerprint(path, part)) is not None}
    return {"frozen": {"path": frozen}, "init": {"from": _init_fingerprint(config, initial_config or {})}}


def _init_fingerprint(config: RunConfig, initial_config: Mapping[str, Any]) -> str:
    if config.init.source is None:
        return NOTHING
    if initial_config.get("init") == {"from": config.init.source, "which": config.init.which}:
        known = initial_config.get("contents", {}).get("init", {}).get("from")
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
        for source_tensor in source.tensor_refs[name]:
            refs: list[TensorRef]
            if isinstance(source_tensor, WeightedSum):
                digest.update(f"{source_tensor.weights}".encode())
                refs = [ref for shards in source_tensor.parameters for ref in shards]
            else:
                refs = [source_tensor]
            for ref in refs:
                digest.update(f"{name} {ref.name} {ref.shape}\n".encode())
                digest.update(_first_elements(ref))
    return digest.hexdigest()[:12]


def _first_elements(ref: TensorRef) -> bytes:
    if not ref.shape:
        numbers = ref.read().reshape(1)
    else:
        numbers = ref.file.get_slice(ref.name)[: 1 if len(ref.shape) > 1 else SAMPLE]
    return bytes(numbers.contiguous().view(torch.uint8).numpy())
