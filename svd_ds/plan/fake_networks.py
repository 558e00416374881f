"""Frozen networks on fake tensors: their shapes without their weights.

A run is planned before its weights are there. The shapes are those in the config.json files of frozen.path if
it is a local folder, otherwise those of the public SVD pipeline and of Stable Diffusion 2.1's text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.clip_encoders import ImageEncoder, TextEncoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.frozen import part_folder
from svd_ds.small_files import read_json

PUBLIC: dict[str, dict[str, Any]] = {
    "vae": {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "out_channels": 3,
        "sample_size": 768,
        "scaling_factor": 0.18215,
    },
    "image_encoder": {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 224,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "projection_dim": 1024,
    },
    "text_encoder": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "max_position_embeddings": 77,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
        "vocab_size": 49408,
    },
}
"""Part -> the fields of its config.json that matter: stabilityai/stable-video-diffusion-img2vid (vae,
image_encoder) and stabilityai/stable-diffusion-2-1-base (text_encoder)."""


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make parameters on `device` in `dtype` inside the context, where `Module.to` does nothing.

    Fake parameters cannot be moved.
    """
    before, module = torch.get_default_dtype(), cast(Any, nn.Module)
    move = module.to
    torch.set_default_dtype(dtype)
    module.to = lambda self, *args, **options: self
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
        module.to = move


def move_stray_parameters(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace parameters that were made in host memory, as diffusers' AlphaBlender makes one."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != device.type or parameter.dtype != dtype:
                moved = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))


def build_autoencoder(path: str, chunk: int, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Build the autoencoder of the pipeline at `path`, see the module's docstring."""
    import diffusers

    fields = _fields(path, "vae")
    kind = getattr(diffusers, fields["_class_name"])
    with made_on(device, dtype):
        network = kind.from_config({key: value for key, value in fields.items() if key[0] != "_"})
    move_stray_parameters(network, device, dtype)
    return Autoencoder(network.eval().requires_grad_(False), chunk)


def build_conditioner(
    config: ConditionerConfig, path: str, device: torch.device, dtype: torch.dtype, cached: bool
) -> Conditioner:
    """Build the conditioner; with `cached` it takes CLIP embeddings from the cache and has no encoder."""
    if config.context == "none":
        return Conditioner(config)
    part = "text_encoder" if config.context == "text" else "image_encoder"
    fields = _fields(path, part)
    if cached:
        return Conditioner(
            config, cached_width=fields["hidden_size" if part == "text_encoder" else "projection_dim"]
        )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder: ImageEncoder | TextEncoder
    with made_on(device, dtype):
        if part == "text_encoder":
            text = CLIPTextModel(CLIPTextConfig(**fields)).eval().requires_grad_(False)
            encoder = TextEncoder(text, _PaddingTokenizer())  # type: ignore[arg-type]
        else:
            image = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields)).eval().requires_grad_(False)
            encoder = ImageEncoder(image)
    return Conditioner(config, encoder)


def _fields(path: str, part: str) -> dict[str, Any]:
    if not Path(path).is_dir():
        return PUBLIC[part]
    folder = part_folder(path, part)
    assert folder is not None
    fields: Any = read_json(folder / "config.json")
    return {key: value for key, value in fields.items() if key not in ("dtype", "torch_dtype")}


class _PaddingTokenizer:
    """Tokenizer that returns tokens of the right shape: the words of a caption do not matter."""

    def __call__(self, captions: Sequence[str], max_length: int, **options: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), max_length, dtype=torch.long))
