"""Weight files of a diffusers folder: their names, and checks of the tensors that are read from them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from svd_ds.tensor_files import TensorRef, index_files, is_finite
from svd_ds.weights.shards import WeightedSum

STEM = "diffusion_pytorch_model"
"""Beginning of the names of diffusers' weight files."""


def diffusers_files(folder: Path) -> list[Path]:
    """List the weight files of a diffusers folder.

    Returns:
        The single file, or the files of the index; without these, the files of the only variant (fp16).

    Raises:
        ValueError: there is no weight file, or there are several variants; the message lists them.
    """
    if (single := folder / f"{STEM}.safetensors").exists():
        return [single]
    if (index := folder / f"{STEM}.safetensors.index.json").exists():
        return index_files(index)
    # diffusers' name of a variant's index is NAME.safetensors.index.fp16.json; in older versions fp16 was
    # elsewhere in the name.
    indices = sorted(folder.glob(f"{STEM}*.index*.json"))
    parts = {file for index in indices for file in index_files(index)}
    variants = [*indices, *sorted(set(folder.glob(f"{STEM}.*.safetensors")) - parts)]
    if len(variants) != 1:
        pickles = ", ".join(file.name for file in sorted(folder.glob("*.bin")))
        others = f"; {pickles} is a pickle, which is not read" if pickles else ""
        names = ", ".join(file.name for file in variants) or "none"
        raise ValueError(
            f"{folder} needs one {STEM}.safetensors, its index, or one variant of these, "
            f"and has {names}{others}"
        )
    return index_files(variants[0]) if indices else variants


def read_checked(ref: TensorRef | WeightedSum) -> Tensor:
    """Read a tensor of a public file; 8-bit floats become float32, because torch cannot compute with them.

    Raises:
        ValueError: the tensor has integers (quantised weights), or a value that is not finite.
    """
    tensor = ref.read()
    if not tensor.is_floating_point():
        raise ValueError(
            f"{ref.path}: {ref.name} has the type {tensor.dtype}: weights of integers "
            "(quantised ones) are not read"
        )
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    if not is_finite(tensor):
        raise ValueError(f"{ref.path}: {ref.name} has a value that is not finite")
    return tensor
