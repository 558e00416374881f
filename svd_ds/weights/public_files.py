"""Public files of weights: their names in a folder and in an index, and what their tensors may be.

An index cannot lead out of its folder by a name, and no pipe or device is opened. Links are followed: the
cache of a hub client consists of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from svd_ds.small_files import check_regular, read_json
from svd_ds.weights.shards import TensorRef, WeightedSum, is_finite

STEM = "diffusion_pytorch_model"
"""Of diffusers' files of weights."""


def diffusers_files(folder: Path) -> list[Path]:
    """The one file, or the several of an index; else those of the one variant (fp16) that is there.

    Raises:
        ValueError: there is none, or several; the message lists what there is.
    """
    if (whole := folder / f"{STEM}.safetensors").exists():
        return [whole]
    if (index := folder / f"{STEM}.safetensors.index.json").exists():
        return files_of_index(index)
    # diffusers names a variant's index NAME.safetensors.index.fp16.json; older versions moved the fp16.
    indices = sorted(folder.glob(f"{STEM}*.index*.json"))
    parts = {file for index in indices for file in files_of_index(index)}
    variants = [*indices, *sorted(set(folder.glob(f"{STEM}.*.safetensors")) - parts)]
    if len(variants) != 1:
        pickles = ", ".join(file.name for file in sorted(folder.glob("*.bin")))
        others = f"; {pickles} is a pickle, which is not read" if pickles else ""
        names = ", ".join(file.name for file in variants) or "none"
        raise ValueError(
            f"{folder} needs one {STEM}.safetensors, its index, or one variant of these, "
            f"and has {names}{others}"
        )
    return files_of_index(variants[0]) if indices else variants


def files_of_index(index: Path) -> list[Path]:
    """The files that an index lists. Raises ValueError where one of them is no file next to it."""
    content = read_json(index)
    try:
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map: it is no index of weights") from None
    for name in names:
        if "\0" in name or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index} lists {name}, which is no file in {index.parent}")
    return [index.parent / name for name in names]


def read_sound(piece: TensorRef | WeightedSum) -> Tensor:
    """A tensor of a public file, floats of 8 bits as float32: they have no arithmetic.

    Raises:
        ValueError: it has integers (quantised weights), or a value that is not finite.
    """
    tensor = piece.read()
    if not tensor.is_floating_point():
        raise ValueError(
            f"{piece.path}: {piece.name} has the type {tensor.dtype}: weights of integers "
            "(quantised ones) are not read"
        )
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    if not is_finite(tensor):
        raise ValueError(f"{piece.path}: {piece.name} has a value that is not finite")
    return tensor


def check_files(folder: Path) -> None:
    """Check what a library is to open by itself: a network's config, weights, and the names in their indices.

    Raises:
        ValueError: a file is a pipe or a device, an index lists a file outside of the folder, or the config
            names code of a hub.
    """
    for file in sorted(folder.glob("*.safetensors")):
        if file.exists():
            check_regular(file)
    for index in sorted(folder.glob("*.index*.json")):
        files_of_index(index)
    if (config := folder / "config.json").is_file() and (named := _code_of_a_hub(read_json(config))):
        raise ValueError(f"{config} names code of a hub, {named}, which is not run")


def _code_of_a_hub(fields: Any) -> str | None:
    """What a config names as an attention of a hub's repository, ORGANISATION/NAME, wherever in it.

    transformers fetches such a one and runs it, unasked, where the package `kernels` is
    installed.
    """
    if not isinstance(fields, dict):
        return None
    for key, value in fields.items():
        if key.endswith("implementation") and "/" in str(value):
            return f"{key} {str(value)[:60]}"
        if (named := _code_of_a_hub(value)) is not None:
            return named
    return None
