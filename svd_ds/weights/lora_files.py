"""LoRA files of other trainers: the mapping of their names to our layers, and the scale of each update.

These formats are read, with or without a wrapper's prefix. MODULE is named as in diffusers or in the original
file:

    unet.MODULE.lora_A.weight            PEFT and diffusers; alpha in the header or in adapter_config.json
    unet.MODULE.lora.down.weight         SVD_Xtend's train_svd_lora.py and older diffusers
    lora_unet_MODULE.lora_down.weight    kohya, MODULE with _ for each dot; alpha in lora_unet_MODULE.alpha
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from svd_ds.model.unet import UNetConfig
from svd_ds.small_files import is_number, read_json
from svd_ds.tensor_files import TensorRef, open_tensors
from svd_ds.weights.public_files import read_checked
from svd_ds.weights.public_names import LAYOUTS, ORIGINAL_PREFIX, public_modules

HEADER = "lora_adapter_metadata"
"""Metadata key under which diffusers saves PEFT's settings."""
ADAPTER_CONFIG = "adapter_config.json"
"""File of PEFT's settings, next to its weights."""
OTHER_SETTINGS = ("use_dora", "use_qalora", "fan_in_fan_out", "alora_invocation_tokens")
"""Settings of PEFT with which an adapter is not W + B A."""
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""File names in a folder of adapters: diffusers' and PEFT's."""
WRAPPERS = ("unet.", "base_model.", ORIGINAL_PREFIX, "model.", "diffusion_model.", "module.", "_orig_mod.")
"""Prefixes that trainers and wrappers put before a module's name."""
OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "dora_scale", "lora_magnitude_vector", "oft_")
"""Parts of tensor names in files whose adapters are not W + B A."""
HALF = re.compile(
    r"(?P<module>.+?)(?:\.lora_linear_layer\.|\.lora[._]|_lora\.)(?P<half>A|B|down|up)(?:\.[\w-]+)?\.weight"
)
EXPECTED = (
    "expected are unet.MODULE.lora_A.weight (PEFT, diffusers), unet.MODULE.lora.down.weight "
    "(train_svd_lora.py) or lora_unet_MODULE.lora_down.weight (kohya)"
)


@dataclass(frozen=True)
class LoraUpdate:
    """Update of one public layer's weight: alpha / rank * B A."""

    name: str
    """The layer's name in the file."""
    part: int
    """Index of the public layer among those that are joined in our layer."""
    num_parts: int
    """Number of public layers that are joined in our layer."""
    a: Tensor
    """Matrix A, (rank, in)."""
    b: Tensor
    """Matrix B, (out, rank)."""
    alpha: float


Updates = Mapping[str, Sequence[LoraUpdate]]
"""Name of our parameter -> its updates."""


def read_lora(path: Path, config: UNetConfig, shapes: Mapping[str, Sequence[int]]) -> Updates:
    """Read a file of adapters for a network.

    Args:
        path: the file, or a folder that holds one of FILES.
        config: config of the network.
        shapes: shapes of the network's parameters, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file belongs to no linear layer of the network, or has another shape.
    """
    path = next((file for name in FILES if (file := path / name).is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {path}")
    pairs, alphas = _pair_halves(path, open_tensors(path))
    settings, layers = _read_settings(path), _layers_by_public_name(config)
    updates: dict[str, list[LoraUpdate]] = {}
    for written_name, halves in pairs.items():
        name = _public_name(written_name)
        module, part, num_parts = layers.get(name, ("", 0, 1))
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise ValueError(
                f"{path} holds {next(iter(halves.values())).name}, which adapts no linear layer of this "
                f"network: {EXPECTED}, MODULE as in diffusers or in the original file"
            )
        a, b = _read_matrices(path, halves, (shape[0] // num_parts, shape[1]))
        if written_name in alphas:
            alpha = _read_alpha(path, alphas[written_name])
        else:
            alpha = _alpha_by_settings(path, settings, name, len(a))
        update = LoraUpdate(written_name, part, num_parts, a, b, alpha)
        updates.setdefault(f"{module}.weight", []).append(update)
    return updates


def add_updates(name: str, tensor: Tensor, updates: Updates, scale: float = 1.0) -> Tensor:
    """Return a parameter plus its updates multiplied by `scale`, in the parameter's dtype."""
    if name not in updates:
        return tensor
    result = tensor.detach().to(torch.float32, copy=True)
    for update in updates[name]:
        low_rank = update.b.float() @ update.a.float()
        result.chunk(update.num_parts)[update.part].add_(low_rank, alpha=scale * update.alpha / len(update.a))
    return result.to(tensor.dtype)


def _pair_halves(
    path: Path, tensors: Mapping[str, TensorRef]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """Return module -> its halves A and B, and module -> its alpha, by the file's names of modules."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    alphas: dict[str, TensorRef] = {}
    for key, ref in tensors.items():
        if other := next((kind for kind in OTHER_KINDS if kind in key), None):
            raise ValueError(
                f"{path} holds {key}: adapters with {other.strip('_')} are not plain LoRA, and not read"
            )
        if match := HALF.fullmatch(key):
            half = {"down": "A", "up": "B"}.get(match["half"], match["half"])
            halves = pairs.setdefault(match["module"], {})
            if half in halves:
                raise ValueError(
                    f"{path} holds {halves[half].name} and {key}: it must have one adapter a layer"
                )
            halves[half] = ref
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = ref
        else:
            raise ValueError(f"{path} holds {key}, which is not a tensor of a LoRA: {EXPECTED}")
    if not pairs:
        raise ValueError(f"{path} holds no adapter: {EXPECTED}")
    if alone := alphas.keys() - pairs.keys():
        raise ValueError(f"{path} holds {min(alone)}.alpha without the adapter that it scales")
    return pairs, alphas


def _read_matrices(
    path: Path, halves: Mapping[str, TensorRef], weight_shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Read A and B, and check them against the (out, in) of the weight that they are added to."""
    if len(halves) != 2:
        (ref,) = halves.values()
        raise ValueError(f"{path} holds {ref.name} without its other half")
    # kohya keeps the shape of the 1 x 1 convolutions that older networks have for linear layers.
    a, b = (read_checked(halves[half]) for half in "AB")
    a, b = (half.flatten(1) if half.dim() > 2 else half for half in (a, b))
    if not a.numel():
        raise ValueError(f"{path}: {halves['A'].name} has the shape {halves['A'].shape}: it has no elements")
    rank = a.shape[0] if a.dim() else 1
    for half, found, expected in (("A", a, (rank, weight_shape[1])), ("B", b, (weight_shape[0], rank))):
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{path}: {halves[half].name} has the shape {tuple(found.shape)}, "
                f"and the network takes {expected}"
            )
    return a, b


def _layers_by_public_name(config: UNetConfig) -> dict[str, tuple[str, int, int]]:
    """Return public module, with dots and as kohya spells it -> (our module, part, number of parts)."""
    layers = {}
    for layout in LAYOUTS:
        for module, publics in public_modules(config, layout).items():
            for part, public in enumerate(publics):
                name = public.removeprefix(ORIGINAL_PREFIX)
                layers[name] = layers["lora_unet_" + name.replace(".", "_")] = (module, part, len(publics))
    return layers


def _public_name(written_name: str) -> str:
    """Strip wrappers' prefixes, and diffusers' older attention processors, from a module name."""
    name, before = written_name, None
    while name != before:
        before = name
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
    name = name.replace(".processor.to_", ".to_")
    return f"{name}.0" if name.endswith(".to_out") else name


def _read_settings(path: Path) -> dict[str, Any]:
    """Read PEFT's settings from the file's header, or from the adapter_config.json next to the file.

    Raises:
        ValueError: the settings are not a JSON object, or belong to another kind of adapter.
    """
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(HEADER, "{}")
    source, config_file = path, path.with_name(ADAPTER_CONFIG)
    try:
        settings = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header {HEADER} that is not JSON: {error}") from error
    if not settings and config_file.is_file():
        source, settings = config_file, read_json(config_file)
    if not isinstance(settings, dict):
        raise ValueError(f"{source} has no settings of adapters by name")
    settings = {key.removeprefix("unet."): value for key, value in settings.items()}
    if other := next((key for key in OTHER_SETTINGS if settings.get(key)), None):
        raise ValueError(f"{source} has {other}: such adapters are not plain LoRA, and not read")
    return settings


def _alpha_by_settings(path: Path, settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Return a module's alpha by PEFT's settings; default: the rank."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern is {str(patterns)[:40]}: it must be an object")
    # PEFT also matches the end of a module's name.
    matches = (value for key, value in patterns.items() if f".{name}".endswith(f".{_public_name(key)}"))
    alpha = next(matches, settings.get("lora_alpha", rank))
    if not is_number(alpha):
        raise ValueError(f"{path}: the alpha of {name} is {str(alpha)[:40]}: it must be a finite number")
    return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def _read_alpha(path: Path, ref: TensorRef) -> float:
    """Read a module's alpha from kohya's tensor of one number."""
    value = ref.read()
    if value.numel() != 1 or not value.isfinite():
        raise ValueError(f"{path}: {ref.name} has the shape {ref.shape}: it must be one finite number")
    return float(value)
