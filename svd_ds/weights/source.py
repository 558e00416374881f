"""Weights on disk, opened: which tensor of which file holds which parameter. The forms: see weights.py."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from svd_ds.model.lora import LoraConfig, add_lora, is_adapter, low_rank_update
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.small_files import read_json
from svd_ds.weights.public_configs import IMAGE_CLASS, config_from_diffusers, config_from_original
from svd_ds.weights.public_files import diffusers_files, read_sound
from svd_ds.weights.public_names import ORIGINAL_PREFIX, from_public, public_modules, public_names, to_public
from svd_ds.weights.shards import TensorRef, WeightedSum, join_shards, network_of, open_checkpoint, tensors_of

CONFIG_KEY = "svd_ds.config"
"""Where a single file of ours keeps its config: shapes alone do not tell how wide a head is."""

MUST_MATCH = (
    "out_channels", "widths", "num_layers", "attention_levels", "transformer_depth", "context_width",
    "head_width", "scalar_width", "temporal",
)  # fmt: skip
"""What a network has from the weights that it starts from, where they have it at all."""
MAY_GROW = ("in_channels", "num_scalars")
"""Of these it may have more."""
ZERO_PADDED = ("conv_in.weight", "embedding.scalars.linear1.weight")
"""May have fewer inputs (dimension 1) on disk than in the network: the added come last and start at zero."""


@dataclass(frozen=True)
class WeightSource:
    """Opened files, and where in them each of our parameters lies."""

    path: Path
    config: UNetConfig
    tensor_refs: Mapping[str, Sequence[TensorRef | WeightedSum]]
    """Our name -> what makes up the parameter, joined along dimension 0."""
    flat: bool
    """The pieces are slices of the flattened parameter, the last ones padded."""
    lora: LoraConfig | None = None
    """The adapters among the parameters."""

    def tensors(self, config: UNetConfig, merge: bool) -> Iterator[tuple[str, Tensor]]:
        network = network_parameters(config, self.lora)
        for name, (shape, _) in network.items():
            if name not in self.tensor_refs or (merge and is_adapter(name)):
                continue
            tensor = self._read(name, shape)
            adapter = [f"{name.removesuffix('.weight')}.lora.{leaf}" for leaf in ("a.weight", "b")]
            if merge and self.lora is not None and adapter[1] in network:
                a, b = (self._read(part, network[part].shape) for part in adapter)
                tensor = tensor + low_rank_update(a, b, self.lora.alpha)
            yield name, tensor

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        if self.flat:
            tensor = join_shards(
                self.tensor_refs[name], network_parameters(self.config, self.lora)[name].shape
            )
        else:
            tensor = from_public(name, torch.cat([read_sound(piece) for piece in self.tensor_refs[name]]))
        # Inputs that the network has and the disk does not are last in our weights' last dimension.
        return F.pad(tensor, (0, shape[-1] - tensor.shape[-1])).contiguous()

    def check(self, config: UNetConfig) -> list[str]:
        """The network's parameters that are not on disk and need not be.

        Raises:
            ValueError: another is missing, or one has another shape, or none of the network's has its name.
        """
        self._check_config(config)
        network = network_parameters(config, self.lora)
        for name, pieces in self.tensor_refs.items():
            if name not in network:
                raise ValueError(
                    f"{pieces[0].path} holds {pieces[0].name}, for which the network has no place"
                )
            self._check_shape(name, network[name].shape, widens=config != self.config)
        new = [name for name in network if name not in self.tensor_refs]
        # What can be new as a whole: what the video model adds to the image model, the scalars, the mask.
        temporal = {name for name, parameter in network.items() if parameter.tag == "temporal"}
        scalars = {name for name in network if name.startswith("embedding.scalars.")}
        mask = {"mask_embedding.weight"}
        for name in new:
            if not any(
                name in whole and whole.isdisjoint(self.tensor_refs) for whole in (temporal, scalars, mask)
            ):
                where = next(iter(self.tensor_refs.values()))[0].path
                raise ValueError(f"{where} lacks {name}, of shape {tuple(network[name].shape)}")
        return new

    def _check_config(self, config: UNetConfig) -> None:
        """Refuse in words a network of another kind than these weights'."""
        absent = set() if self.config.num_scalars else {"scalar_width"}
        layers = network_parameters(self.config, self.lora).items()
        if not any(parameter.tag == "temporal" and name in self.tensor_refs for name, parameter in layers):
            absent.add("temporal")
        for name in (*MUST_MATCH, *MAY_GROW):
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if name in absent or theirs == ours or (name in MAY_GROW and theirs < ours):
                continue
            rule = "it may only grow" if name in MAY_GROW else "it must stay"
            raise ValueError(
                f"{self.path} has {name} {theirs}, and the network that would start from it {ours}: {rule}"
            )

    def _check_shape(self, name: str, shape: torch.Size, widens: bool) -> None:
        pieces = self.tensor_refs[name]
        found: tuple[int, ...]
        expected: tuple[int, ...]
        if self.flat:
            expected = tuple(network_parameters(self.config, self.lora)[name].shape)
            length, numel = sum(piece.shape[0] for piece in pieces), math.prod(expected)
            found, fits = (length,), 0 <= length - numel < len(pieces)
        else:
            found = pieces[0].shape
            part = torch.empty(shape[0] // len(pieces), *shape[1:], device="meta")
            expected = tuple(to_public(name, part).shape)
            fits = found == expected
            if widens and name in ZERO_PADDED and len(found) == len(expected):
                fits = found[1] <= expected[1] and (found[0], *found[2:]) == (expected[0], *expected[2:])
        if not fits:
            raise ValueError(
                f"{pieces[0].path}: {pieces[0].name} has the shape {found}, and the network takes {expected}"
            )


class Parameter(NamedTuple):
    shape: torch.Size
    tag: str


@functools.lru_cache(maxsize=4)
def network_parameters(config: UNetConfig, lora: LoraConfig | None = None) -> dict[str, Parameter]:
    """Every parameter of the network and its adapters, by name."""
    with torch.device("meta"):
        unet = UNet(config)
        if lora is not None:
            add_lora(unet, lora)
    tags = parameter_tags(unet)
    return {name: Parameter(parameter.shape, tags[name]) for name, parameter in unet.named_parameters()}


def open_weights(path: Path, which: str | None) -> WeightSource:
    """Open what `path` is; arguments and errors are those of `weights.read_weights`."""
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if network_of(path) is not None:
        return _open_checkpoint(path, which)
    if which not in (None, "raw"):
        raise ValueError(f"{path} is not a run or a checkpoint, so it has no average {which!r}")
    if path.is_file():
        return _open_original(path)
    folder = path / "unet" if (path / "unet" / "config.json").exists() else path
    if (folder / "config.json").exists():
        return _open_diffusers(folder)
    raise ValueError(
        f"{path} is neither a diffusers folder, nor a run or a checkpoint, nor a .safetensors file"
    )


def _open_checkpoint(path: Path, which: str | None) -> WeightSource:
    settings, pieces = open_checkpoint(path, "unet", which)
    with _errors_of(path / "unet" / "config.json"):
        config = UNetConfig(**settings["config.json"])
    with _errors_of(path / "unet" / "lora.json"):
        lora = LoraConfig(**settings["lora.json"]) if "lora.json" in settings else None
    return WeightSource(path, config, pieces, flat=True, lora=lora)


def _open_original(path: Path) -> WeightSource:
    found = tensors_of(path)
    prefix = _prefix(path, found, "input_blocks.0.0.weight", ORIGINAL_PREFIX)
    tensors = {
        ORIGINAL_PREFIX + name.removeprefix(prefix): piece
        for name, piece in found.items()
        if name.startswith(prefix)
    }
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(CONFIG_KEY)
    with _errors_of(path):
        if written:
            config = UNetConfig(**json.loads(written))
        else:
            config = config_from_original({name: piece.shape for name, piece in tensors.items()})
    return _public_source(path, config, "original", tensors)


def _open_diffusers(folder: Path) -> WeightSource:
    fields = read_json(folder / "config.json")
    with _errors_of(folder / "config.json"):
        config = config_from_diffusers(fields)
    found: dict[str, TensorRef] = {}
    for file in diffusers_files(folder):
        found |= tensors_of(file)
    prefix = _prefix(folder, found, "conv_in.weight", "")
    tensors = {name.removeprefix(prefix): piece for name, piece in found.items()}
    # An image UNet has no temporal half beside its residual blocks, so it does not name the spatial one.
    infix = "spatial_res_block." if fields["_class_name"] == IMAGE_CLASS else ""
    return _public_source(folder, config, "diffusers", tensors, leave_out=infix)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Name `path` in what a description of a network that is none raises.

    Raises:
        ValueError: in place of whatever is raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Of another type than a network's description has, or with names that this version does not know.
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ZeroDivisionError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} describes no network that svd_ds knows: {told}") from error


def _prefix(path: Path, names: Iterable[str], first_layer: str, usual: str) -> str:
    """What stands before all names of the network: trainers save it under a wrapper's name, or without any.

    Raises:
        ValueError: no tensor is the network's first layer; the message says under which name it is expected.
    """
    names = list(names)
    found = [name.removesuffix(first_layer) for name in names if f".{name}".endswith(f".{first_layer}")]
    if not found:
        raise ValueError(
            f"{path} holds no {usual}{first_layer}, nor one with another prefix: it is no UNet in this "
            f"layout; its first tensor is {min(names, default='missing')}"
        )
    return usual if usual in found else min(found, key=len)


def _public_source(
    path: Path, config: UNetConfig, layout: str, tensors: dict[str, TensorRef], leave_out: str = ""
) -> WeightSource:
    modules = public_modules(config, layout)
    left = dict(tensors)
    pieces = {}
    for name in network_parameters(config):
        names = [public.replace(leave_out, "") for public in public_names(name, modules)]
        if all(public in tensors for public in names):
            pieces[name] = [left.pop(public) for public in names]
    if left:
        piece = next(iter(left.values()))
        raise ValueError(f"{piece.path} holds {piece.name}, for which the network has no place")
    return WeightSource(path, config, pieces, flat=False)
