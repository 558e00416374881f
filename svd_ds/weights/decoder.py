"""Trained decoders: loaded from a checkpoint, and saved in a pipeline folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder

from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.decoder import Decoder, DecoderConfig
from svd_ds.weights.shards import checkpoint_network, join_shards, open_checkpoint

AUTOENCODER_FIELDS = (
    "in_channels", "out_channels", "down_block_types", "block_out_channels", "layers_per_block",
    "latent_channels", "sample_size", "scaling_factor", "force_upcast",
)  # fmt: skip
"""Config fields of diffusers' AutoencoderKLTemporalDecoder; the config of an image autoencoder has more."""


def load_decoder(path: str | Path, which: str | None = None) -> Decoder:
    """Load a decoder from a run or a checkpoint, float32 on the CPU.

    Args:
        path: the folder of a run or a checkpoint.
        which: `raw`, or the name of an average; default: the first average.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not a run or checkpoint of a decoder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if checkpoint_network(path) is None:
        raise ValueError(f"{path} is neither a run nor a checkpoint")
    settings, shards_by_name = open_checkpoint(path, "decoder", which)
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**settings["config.json"]))
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    weights = {name: join_shards(shards, shapes[name]) for name, shards in shards_by_name.items()}
    decoder.load_state_dict(weights, assign=True)
    return decoder


def save_pipeline_parts(frozen: str | Path, decoder: Decoder, folder: str | Path) -> None:
    """Copy the pipeline at `frozen` to `folder`, with `decoder` in its vae/.

    Args:
        frozen: a pipeline folder, all parts of which are copied, or a hub id, of which only vae/ is written.
        decoder: the trained decoder.
        folder: the folder to write.

    Raises:
        ValueError: the decoder of the pipeline has another shape.
    """
    autoencoder = Autoencoder.load(frozen)
    expected = DecoderConfig.from_autoencoder(autoencoder.network)
    if expected != decoder.config:
        raise ValueError(f"the decoder in {frozen} is {expected}, and the trained one is {decoder.config}")
    if Path(frozen).is_dir():
        # The model_index.json of an image pipeline names the class of an image autoencoder.
        left_out = ["vae"] if autoencoder.is_temporal else ["vae", "model_index.json"]
        shutil.copytree(frozen, folder, ignore=shutil.ignore_patterns(*left_out))
    fields = autoencoder.network.config
    vae: Any = AutoencoderKLTemporalDecoder(**{field: fields[field] for field in AUTOENCODER_FIELDS})
    vae.encoder.load_state_dict(autoencoder.network.encoder.state_dict())
    vae.quant_conv.load_state_dict(autoencoder.network.quant_conv.state_dict())
    vae.decoder.load_state_dict(decoder.state_dict())
    vae.save_pretrained(str(Path(folder) / "vae"))
