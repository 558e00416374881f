"""Files of low-rank adapters as trainers write them: whose names are which layers of ours, and at what scale.

Read are, each with or without a prefix of a wrapper, modules named as in diffusers or in the original file:

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
from svd_ds.weights.public_files import read_sound
from svd_ds.weights.public_names import LAYOUTS, ORIGINAL_PREFIX, public_modules
from svd_ds.weights.shards import TensorRef, tensors_of

HEADER = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a file."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's settings next to its file."""
OTHER_SETTINGS = ("use_dora", "use_qalora", "fan_in_fan_out", "alora_invocation_tokens")
"""Settings of PEFT with which an adapter is not W + B A."""
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names in a folder of adapters: diffusers' and PEFT's."""
WRAPPERS = ("unet.", "base_model.", ORIGINAL_PREFIX, "model.", "diffusion_model.", "module.", "_orig_mod.")
"""Prefixes that trainers and wrappers put in front of a module's name."""
OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "dora_scale", "lora_magnitude_vector", "oft_")
"""Parts of names in files of adapters that are not W + B A."""
HALF = re.compile(
    r"(?P<module>.+?)(?:\.lora_linear_layer\.|\.lora[._]|_lora\.)(?P<half>A|B|down|up)(?:\.[\w-]+)?\.weight"
)
EXPECTED = (
    "expected are unet.MODULE.lora_A.weight (PEFT, diffusers), unet.MODULE.lora.down.weight "
    "(train_svd_lora.py) or lora_unet_MODULE.lora_down.weight (kohya)"
)


@dataclass(frozen=True)
class LoraUpdate:
    """What a file adds to one public layer's weight: alpha / rank * B A."""

    name: str
    """The layer's name in the file."""
    part: int
    """Which of the public layers that are joined in our layer ..."""
    num_parts: int
    """... and how many these are."""
    a: Tensor
    """(rank, in)"""
    b: Tensor
    """(out, rank)"""
    alpha: float


Updates = Mapping[str, Sequence[LoraUpdate]]
"""Name of a parameter of ours -> what is added to it."""


def read_lora(path: Path, config: UNetConfig, shapes: Mapping[str, Sequence[int]]) -> Updates:
    """Read a file of adapters for a network.

    Args:
        path: the file, or a folder that holds one of FILES.
        config: the network's.
        shapes: the network's parameters by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file belongs to no linear layer of the network, or has another shape.
    """
    path = next((file for name in FILES if (file := path / name).is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {path}")
    pieces = tensors_of(path)
    pairs, alphas = _paired(path, pieces)
    settings, places = _settings(path), _places(config)
    updates: dict[str, list[LoraUpdate]] = {}
    for written, halves in pairs.items():
        name = _public(written)
        module, part, num_parts = places.get(name, ("", 0, 1))
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise ValueError(
                f"{path} holds {next(iter(halves.values())).name}, which adapts no linear layer of this "
                f"network: {EXPECTED}, MODULE as in diffusers or in the original file"
            )
        wanted = (shape[0] // num_parts, shape[1])
        a, b = _matrices(path, halves, wanted)
        alpha = (
            _alpha_of(path, alphas[written]) if written in alphas else _alpha(path, settings, name, len(a))
        )
        update = LoraUpdate(written, part, num_parts, a, b, alpha)
        updates.setdefault(f"{module}.weight", []).append(update)
    return updates


def merged(name: str, tensor: Tensor, updates: Updates, scale: float = 1.0) -> Tensor:
    """A parameter with its updates, multiplied by `scale`, added; in its own dtype."""
    if name not in updates:
        return tensor
    result = tensor.detach().to(torch.float32, copy=True)
    for update in updates[name]:
        low_rank = update.b.float() @ update.a.float()
        result.chunk(update.num_parts)[update.part].add_(low_rank, alpha=scale * update.alpha / len(update.a))
    return result.to(tensor.dtype)


def _paired(
    path: Path, pieces: Mapping[str, TensorRef]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """Module -> its halves A and B, and module -> its alpha, by the file's own names of modules."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    alphas: dict[str, TensorRef] = {}
    for key, piece in pieces.items():
        if other := next((kind for kind in OTHER_KINDS if kind in key), None):
            raise ValueError(
                f"{path} holds {key}: adapters with {other.strip('_')} are no plain LoRA, and not read"
            )
        if match := HALF.fullmatch(key):
            half = {"down": "A", "up": "B"}.get(match["half"], match["half"])
            halves = pairs.setdefault(match["module"], {})
            if half in halves:
                raise ValueError(
                    f"{path} holds {halves[half].name} and {key}: it must have one adapter a layer"
                )
            halves[half] = piece
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = piece
        else:
            raise ValueError(f"{path} holds {key}, which is no tensor of a LoRA: {EXPECTED}")
    if not pairs:
        raise ValueError(f"{path} holds no adapter: {EXPECTED}")
    if alone := alphas.keys() - pairs.keys():
        raise ValueError(f"{path} holds {min(alone)}.alpha without the adapter that it scales")
    return pairs, alphas


def _matrices(path: Path, halves: Mapping[str, TensorRef], wanted: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A and B, checked against the (out, in) of the weight that they are added to."""
    if len(halves) != 2:
        (piece,) = halves.values()
        raise ValueError(f"{path} holds {piece.name} without its other half")
    # kohya writes the 1 x 1 convolutions that older networks have in place of linear layers.
    a, b = (read_sound(halves[half]) for half in "AB")
    a, b = (half.flatten(1) if half.dim() > 2 else half for half in (a, b))
    if not a.numel():
        raise ValueError(f"{path}: {halves['A'].name} has the shape {halves['A'].shape}, which is of no rank")
    rank = a.shape[0] if a.dim() else 1
    for half, found, fitting in (("A", a, (rank, wanted[1])), ("B", b, (wanted[0], rank))):
        if tuple(found.shape) != fitting:
            raise ValueError(
                f"{path}: {halves[half].name} has the shape {tuple(found.shape)}, "
                f"and the network takes {fitting}"
            )
    return a, b


def _places(config: UNetConfig) -> dict[str, tuple[str, int, int]]:
    """Public module, with dots and as kohya spells it -> (our module, part, number of parts)."""
    places = {}
    for layout in LAYOUTS:
        for module, publics in public_modules(config, layout).items():
            for part, public in enumerate(publics):
                name = public.removeprefix(ORIGINAL_PREFIX)
                places[name] = places["lora_unet_" + name.replace(".", "_")] = (module, part, len(publics))
    return places


def _public(written: str) -> str:
    """The public name of a module, without wrappers' prefixes and diffusers' older attention processors."""
    name, before = written, None
    while name != before:
        before = name
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
    name = name.replace(".processor.to_", ".to_")
    return f"{name}.0" if name.endswith(".to_out") else name


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's settings: of the file's header, or of the adapter_config.json that PEFT writes next to it.

    Raises:
        ValueError: they are no JSON object, or of another kind of adapter.
    """
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(HEADER, "{}")
    where, beside = path, path.with_name(ADAPTER_CONFIG)
    try:
        settings = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header {HEADER} that is no JSON: {error}") from error
    if not settings and beside.is_file():
        where, settings = beside, read_json(beside)
    if not isinstance(settings, dict):
        raise ValueError(f"{where} has no settings of adapters by name")
    settings = {key.removeprefix("unet."): value for key, value in settings.items()}
    if other := next((key for key in OTHER_SETTINGS if settings.get(key)), None):
        raise ValueError(f"{where} has {other}: such adapters are no plain LoRA, and not read")
    return settings


def _alpha(path: Path, settings: Mapping[str, Any], name: str, rank: int) -> float:
    """By PEFT's settings; without any, alpha is the rank."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern is {str(patterns)[:40]}, and must be an object")
    # PEFT takes the end of a module's name as well.
    fitting = (value for key, value in patterns.items() if f".{name}".endswith(f".{_public(key)}"))
    alpha = next(fitting, settings.get("lora_alpha", rank))
    if not is_number(alpha):
        raise ValueError(f"{path}: the alpha of {name} is {str(alpha)[:40]}, and must be a finite number")
    return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def _alpha_of(path: Path, piece: TensorRef) -> float:
    """From kohya's tensor of one number."""
    value = piece.read()
    if value.numel() != 1 or not value.isfinite():
        raise ValueError(f"{path}: {piece.name} has the shape {piece.shape}, and must be one finite number")
    return float(value)
