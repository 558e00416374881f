"""Opened weight files, and the map from our parameters to their tensors. The formats: see io.py."""

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
from svd_ds.tensor_files import TensorRef, open_tensors
from svd_ds.weights.public_configs import IMAGE_CLASS, config_from_diffusers, config_from_original
from svd_ds.weights.public_files import diffusers_files, read_checked
from svd_ds.weights.public_names import ORIGINAL_PREFIX, from_public, public_modules, public_names, to_public
from svd_ds.weights.shards import WeightedSum, checkpoint_network, join_shards, open_checkpoint

CONFIG_KEY = "svd_ds.config"
"""Metadata key of the config in a single file that we write: tensor shapes do not determine the width of a
head."""

MUST_MATCH = (
    "out_channels", "widths", "num_layers", "attention_levels", "transformer_depth", "context_width",
    "head_width", "scalar_width", "temporal",
)  # fmt: skip
"""Config fields in which a network must equal the weights that it starts from, if these have the field."""
MAY_GROW = ("in_channels", "num_scalars")
"""Config fields that may be larger in the network than in the weights that it starts from."""
ZERO_PADDED = ("conv_in.weight", "embedding.scalars.linear1.weight")
"""Parameters that may have fewer inputs on disk than in the network; the added ones are last, and zero."""


@dataclass(frozen=True)
class WeightSource:
    """Opened files, and the tensors in them that make up each of our parameters."""

    path: Path
    config: UNetConfig
    tensor_refs: Mapping[str, Sequence[TensorRef | WeightedSum]]
    """Our name -> the tensors that, joined along dimension 0, are the parameter."""
    flat: bool
    """True if the tensors are the ranks' shards of the flattened parameter, the last ones padded."""
    lora: LoraConfig | None = None
    """Config of the adapters among the parameters; None if there are no adapters."""

    def tensors(self, config: UNetConfig, merge: bool) -> Iterator[tuple[str, Tensor]]:
        """Read the parameters of a network that takes these weights, one by one.

        Args:
            config: config of the network, which `check` accepts.
            merge: add the updates of the adapters to the weights.
        """
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
            tensor = from_public(name, torch.cat([read_checked(ref) for ref in self.tensor_refs[name]]))
        # The inputs that only the network has are the last ones, in the last dimension of our weights.
        return F.pad(tensor, (0, shape[-1] - tensor.shape[-1])).contiguous()

    def check(self, config: UNetConfig) -> list[str]:
        """Check that a network can take these weights.

        Returns:
            The names of the network's parameters that are new: the weights lack them.

        Raises:
            ValueError: a parameter is missing that must not be new, or the weights have one that the network
                lacks or that has another shape there.
        """
        self._check_config(config)
        network = network_parameters(config, self.lora)
        for name, refs in self.tensor_refs.items():
            if name not in network:
                raise ValueError(f"{refs[0].path} holds {refs[0].name}, which the network does not have")
            self._check_shape(name, network[name].shape, widens=config != self.config)
        new = [name for name in network if name not in self.tensor_refs]
        # Each of these groups may be new, but only as a whole.
        temporal = {name for name, parameter in network.items() if parameter.tag == "temporal"}
        scalars = {name for name in network if name.startswith("embedding.scalars.")}
        mask = {"mask_embedding.weight"}
        for name in new:
            if not any(
                name in group and group.isdisjoint(self.tensor_refs) for group in (temporal, scalars, mask)
            ):
                path = next(iter(self.tensor_refs.values()))[0].path
                raise ValueError(f"{path} lacks {name}, of shape {tuple(network[name].shape)}")
        return new

    def _check_config(self, config: UNetConfig) -> None:
        """Refuse a network whose config does not fit that of the weights; the message names the field."""
        absent = set() if self.config.num_scalars else {"scalar_width"}
        parameters = network_parameters(self.config, self.lora).items()
        if not any(
            parameter.tag == "temporal" and name in self.tensor_refs for name, parameter in parameters
        ):
            absent.add("temporal")
        for name in (*MUST_MATCH, *MAY_GROW):
            on_disk, wanted = getattr(self.config, name), getattr(config, name)
            if name in absent or on_disk == wanted or (name in MAY_GROW and on_disk < wanted):
                continue
            rule = f"at least {on_disk}" if name in MAY_GROW else "the same"
            raise ValueError(
                f"model.{name} is {wanted}, and the weights at {self.path} have {on_disk}: it must be {rule}"
            )

    def _check_shape(self, name: str, shape: torch.Size, widens: bool) -> None:
        refs = self.tensor_refs[name]
        found: tuple[int, ...]
        expected: tuple[int, ...]
        if self.flat:
            expected = tuple(network_parameters(self.config, self.lora)[name].shape)
            length, numel = sum(ref.shape[0] for ref in refs), math.prod(expected)
            found, fits = (length,), 0 <= length - numel < len(refs)
        else:
            found = refs[0].shape
            part = torch.empty(shape[0] // len(refs), *shape[1:], device="meta")
            expected = tuple(to_public(name, part).shape)
            fits = found == expected
            if widens and name in ZERO_PADDED and len(found) == len(expected):
                fits = found[1] <= expected[1] and (found[0], *found[2:]) == (expected[0], *expected[2:])
        if not fits:
            raise ValueError(
                f"{refs[0].path}: {refs[0].name} has the shape {found}, and the network takes {expected}"
            )


class Parameter(NamedTuple):
    """Shape and tag of a parameter; the tags are those of `parameter_tags`."""

    shape: torch.Size
    tag: str


@functools.lru_cache(maxsize=4)
def network_parameters(config: UNetConfig, lora: LoraConfig | None = None) -> dict[str, Parameter]:
    """Return name -> parameter, of a network and its adapters."""
    with torch.device("meta"):
        unet = UNet(config)
        if lora is not None:
            add_lora(unet, lora)
    tags = parameter_tags(unet)
    return {name: Parameter(parameter.shape, tags[name]) for name, parameter in unet.named_parameters()}


def open_weights(path: Path, which: str | None) -> WeightSource:
    """Open the weights at `path`; arguments and errors are those of `io.read_weights`."""
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if checkpoint_network(path) is not None:
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
    settings, shards = open_checkpoint(path, "unet", which)
    with _name_file_in_errors(path / "unet" / "config.json"):
        config = UNetConfig(**settings["config.json"])
    with _name_file_in_errors(path / "unet" / "lora.json"):
        lora = LoraConfig(**settings["lora.json"]) if "lora.json" in settings else None
    return WeightSource(path, config, shards, flat=True, lora=lora)


def _open_original(path: Path) -> WeightSource:
    found = open_tensors(path)
    prefix = _find_prefix(path, found, "input_blocks.0.0.weight", ORIGINAL_PREFIX)
    tensors = {
        ORIGINAL_PREFIX + name.removeprefix(prefix): ref
        for name, ref in found.items()
        if name.startswith(prefix)
    }
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(CONFIG_KEY)
    with _name_file_in_errors(path):
        if written:
            config = UNetConfig(**json.loads(written))
        else:
            config = config_from_original({name: ref.shape for name, ref in tensors.items()})
    return _public_source(path, config, "original", tensors)


def _open_diffusers(folder: Path) -> WeightSource:
    fields = read_json(folder / "config.json")
    with _name_file_in_errors(folder / "config.json"):
        config = config_from_diffusers(fields)
    found: dict[str, TensorRef] = {}
    for file in diffusers_files(folder):
        found |= open_tensors(file)
    prefix = _find_prefix(folder, found, "conv_in.weight", "")
    tensors = {name.removeprefix(prefix): ref for name, ref in found.items()}
    # The residual blocks of an image UNet have no temporal part, so their names have no spatial part.
    infix = "spatial_res_block." if fields["_class_name"] == IMAGE_CLASS else ""
    return _public_source(folder, config, "diffusers", tensors, leave_out=infix)


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Add `path` to the message of an error about an invalid description of a network.

    Raises:
        ValueError: any error of the block, with the path.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # A field has another type, is missing, or is unknown to this version.
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ZeroDivisionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} describes no network that svd_ds knows: {reason}") from error


def _find_prefix(path: Path, names: Iterable[str], first_layer: str, usual: str) -> str:
    """Find the prefix of the network's tensor names, such as a wrapper's name; it may be empty.

    Raises:
        ValueError: no tensor is the network's first layer; the message has its expected name.
    """
    names = list(names)
    found = [name.removesuffix(first_layer) for name in names if f".{name}".endswith(f".{first_layer}")]
    if not found:
        raise ValueError(
            f"{path} holds no {usual}{first_layer}, nor one with another prefix: it is not a UNet in this "
            f"layout; its first tensor is {min(names, default='missing')}"
        )
    return usual if usual in found else min(found, key=len)


def _public_source(
    path: Path, config: UNetConfig, layout: str, tensors: dict[str, TensorRef], leave_out: str = ""
) -> WeightSource:
    """Map our parameters to the tensors of a public layout.

    Args:
        leave_out: part of the public names that the names in the files lack.
    """
    modules = public_modules(config, layout)
    left = dict(tensors)
    refs = {}
    for name in network_parameters(config):
        names = [public.replace(leave_out, "") for public in public_names(name, modules)]
        if all(public in tensors for public in names):
            refs[name] = [left.pop(public) for public in names]
    if left:
        ref = next(iter(left.values()))
        raise ValueError(f"{ref.path} holds {ref.name}, which the network does not have")
    return WeightSource(path, config, refs, flat=False)
