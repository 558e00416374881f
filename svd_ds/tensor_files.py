"""Tensors of safetensors files, opened without reading them, and checks of folders of weights.

An index must not name files outside its folder, and no pipe or device is opened. Symbolic links are followed,
because the caches of hub clients consist of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svd_ds.small_files import check_regular, read_json


@dataclass(frozen=True)
class TensorRef:
    """A tensor in an open file, not read yet."""

    path: Path
    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape by the file's header."""
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        """Read the tensor, in the dtype on disk."""
        return self.file.get_tensor(self.name)


def open_tensors(path: Path) -> dict[str, TensorRef]:
    """Open a safetensors file.

    Returns:
        Name -> tensor, for every tensor of the file.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    check_regular(path)
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {_other_format(path) or error}") from None
    return {name: TensorRef(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _other_format(path: Path) -> str | None:
    """Recognise a file that is not a safetensors file by its first bytes."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the weights; fetch them with git lfs pull"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a pickle of PyTorch, which is not read, as it could run code"
    if head.lstrip()[:1] == b"<":
        return "it is an HTML page"
    return None


def is_finite(values: Tensor) -> bool:
    """Return True if no element is NaN or infinite."""
    # One pass that allocates nothing: minimum and maximum are NaN if any element is. isfinite is far slower.
    return values.numel() == 0 or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def index_files(index: Path) -> list[Path]:
    """List the files that a safetensors index (*.index.json) names.

    Raises:
        ValueError: a name is not that of a file in the folder of the index.
    """
    content = read_json(index)
    try:
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map: it is not an index of weights") from None
    for name in names:
        if "\0" in name or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not a file in {index.parent}")
    return [index.parent / name for name in names]


def check_model_folder(folder: Path) -> None:
    """Check a folder before a library loads it: the config, the weights and the names in their indices.

    Raises:
        ValueError: a file is a pipe or a device, an index lists a file outside of the folder, or the config
            names code of a hub.
    """
    for file in sorted(folder.glob("*.safetensors")):
        if file.exists():
            check_regular(file)
    for index in sorted(folder.glob("*.index*.json")):
        index_files(index)
    if (config := folder / "config.json").is_file() and (named := _hub_code(read_json(config))):
        raise ValueError(f"{config} names code of a hub, {named}, which is not run")


def _hub_code(fields: Any) -> str | None:
    """Find an attention implementation from a hub, ORGANISATION/NAME, anywhere in a config.

    If the package `kernels` is installed, transformers fetches and runs such code without asking.
    """
    if not isinstance(fields, dict):
        return None
    for key, value in fields.items():
        if key.endswith("implementation") and "/" in str(value):
            return f"{key} {str(value)[:60]}"
        if (named := _hub_code(value)) is not None:
            return named
    return None
