"""Models from local files and folders: nothing is downloaded, and no object is unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svd_ds.tensor_files import check_model_folder


def load_pretrained(model_class: str, processor_class: str, folder: str, device: str) -> tuple[Any, Any]:
    """Load a model and its processor from a local transformers folder.

    Args:
        model_class: name of the model's class in transformers.
        processor_class: name of the processor's class in transformers.
        folder: the local folder.
        device: device of the model.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: a weight index refers to files outside the folder.
    """
    import transformers  # takes seconds, and curation may not need it

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    check_model_folder(Path(folder))
    network = getattr(transformers, model_class).from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    )
    processor = getattr(transformers, processor_class).from_pretrained(folder, local_files_only=True)
    return network.to(device).eval(), processor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a published .safetensors, .pth or .pt file; of a pickle only tensors are accepted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds anything but named tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of tensors: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds other objects than named tensors")
    return content
