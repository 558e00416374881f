"""Loading of a pipeline's frozen parts, from a local folder or from a hub id.

A pipeline has a folder for each part: `vae/ image_encoder/ text_encoder/ tokenizer/`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from svd_ds.small_files import read_json
from svd_ds.tensor_files import check_model_folder

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_frozen(
    kind: Any, path: str | Path, part: str, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """Load a network of a pipeline, in eval mode and without gradients.

    Only safetensors are read. If a folder has only a half-precision variant (`*.fp16.safetensors`), that is
    read.

    Args:
        kind: the class of diffusers or transformers.
        path: the pipeline, a folder or a hub id.
        part: the folder in the pipeline.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        FileNotFoundError: the pipeline lacks the part or its weights.
        ValueError: a file of the part is not safe to load, see `check_model_folder`.
    """
    folder = part_folder(path, part)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if folder is not None:
        weights = [file.name for file in folder.glob("*.safetensors")]
        if not weights:
            raise FileNotFoundError(f"{folder} holds no *.safetensors weights")
        check_model_folder(folder)
        if all(".fp16." in name for name in weights):
            options["variant"] = "fp16"
    network: nn.Module = from_pretrained(kind, path, part, **options)
    return network.to(device).eval().requires_grad_(False)


def fingerprint(path: str | Path, part: str) -> str | None:
    """Hash the weights of a part, without loading them, to 12 hexadecimal digits.

    The hash is over names, shapes and first rows of the tensors, in bfloat16, in which any two trainings
    differ. For a hub id, the id is hashed.

    Returns:
        None if the pipeline has no such part.
    """
    try:
        folder = part_folder(path, part)
    except FileNotFoundError:
        return None
    digest = hashlib.sha256()
    if folder is None:
        digest.update(f"{path} {part}".encode())
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                shape = tensors.get_slice(name).get_shape()
                first = tensors.get_slice(name)[:1] if shape else tensors.get_tensor(name)
                digest.update(f"{name} {shape}\n".encode())
                digest.update(first.to(torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()[:12]


def class_name(path: str | Path, part: str) -> str:
    """Read the name of the diffusers class in a part's config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no class name.
    """
    from diffusers import AutoencoderKL

    folder = part_folder(path, part)
    fields: Any
    if folder is not None:
        fields = read_json(folder / "config.json")
    else:
        try:
            fields = AutoencoderKL.load_config(str(path), subfolder=part)
        except OSError as error:
            raise _not_on_the_hub(path, part, error) from error
    if "_class_name" not in fields:
        raise ValueError(f"{path}'s {part}/config.json has no _class_name: it is not a config of diffusers")
    return fields["_class_name"]


def from_pretrained(kind: Any, path: str | Path, part: str, **options: Any) -> Any:
    """Call `kind.from_pretrained` on a part of a local pipeline folder or of a hub repository.

    Raises:
        FileNotFoundError: the pipeline lacks the part.
    """
    _silence_libraries()
    folder = part_folder(path, part)
    if folder is not None:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    try:
        return kind.from_pretrained(str(path), subfolder=part, **options)
    except OSError as error:
        raise _not_on_the_hub(path, part, error) from error


def _not_on_the_hub(path: str | Path, part: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is not a local folder, and its {part}/ could not be loaded from the hub: {error}"
    )


def part_folder(path: str | Path, part: str) -> Path | None:
    """Return the local folder of a pipeline's part; None if `path` is a hub id like "organisation/name".

    Raises:
        FileNotFoundError: `path` is neither, or the folder lacks `part/config.json` (for a tokenizer,
            `tokenizer_config.json`).
    """
    if not Path(path).is_dir():
        if HUB_ID.fullmatch(str(path)) and not Path(path).exists():
            return None
        raise FileNotFoundError(f"{path} is neither a folder nor a hub id like organisation/name")
    folder = Path(path) / part
    config = "tokenizer_config.json" if part == "tokenizer" else "config.json"
    if not (folder / config).is_file():
        raise FileNotFoundError(
            f"{path} has no {part}/{config}: it must be a folder in the layout of the public SVD pipeline"
        )
    return folder


def _silence_libraries() -> None:
    """Turn off the libraries' progress bars and hints; errors stay."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
