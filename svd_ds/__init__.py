"""svd_ds: train Stable Video Diffusion (arXiv 2311.15127), ZeRO-3 sharded, in all the paper's stages."""

from __future__ import annotations

from typing import Any

__all__ = ["load_unet", "save_unet"]


def __getattr__(name: str) -> Any:
    # On first use, so that `import svd_ds` alone does not import torch.
    if name in __all__:
        from svd_ds.weights import io

        return getattr(io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
