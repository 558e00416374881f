"""Models of transformers from local folders: nothing is fetched, and nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(kind: str, reader: str, folder: str, device: str) -> tuple[Any, Any]:
    """The model in `folder` and what prepares its input, as the transformers classes `kind` and `reader`.

    Raises FileNotFoundError where it is no model's folder; what transformers raises where it is another's.
    """
    import transformers  # takes seconds, and curation may need none

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    network = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    processor = getattr(transformers, reader).from_pretrained(folder, local_files_only=True)
    return network.to(device).eval(), processor
