"""Whether a network fits its frozen parts, conditions, data and the stage before; refused before it computes.

Each check raises ValueError with one sentence that names the setting and both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svd_ds.config import RunConfig
from svd_ds.data.config import Shape
from svd_ds.data.loader import Loader
from svd_ds.diffusion.noise import SHIFTED
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import RELEASED_SCALARS, Conditioner
from svd_ds.model.frozen import fingerprint
from svd_ds.sample import frozen_folder, run_settings


def check_config_fits(
    config: RunConfig, loader: Loader, autoencoder: Autoencoder, conditioner: Conditioner | None
) -> None:
    """Refuse a network that does not fit its frozen parts, conditions or data, with both numbers."""
    multiple = autoencoder.downsampling
    if conditioner is not None:
        _check_unet(config, autoencoder, conditioner)
        for shape in config.data.shapes:
            _check_num_frames(config, shape)
        _check_conditions(config, loader)
        multiple *= config.model.size_multiple
    for shape in config.data.shapes:
        for name, size in (("height", shape.height), ("width", shape.width)):
            if size % multiple:
                where = f"data.buckets.{shape} has a {name} of" if config.data.buckets else f"data.{name} is"
                raise ValueError(f"{where} {size}: this network takes multiples of {multiple} pixels")
    _check_cache(config, loader, autoencoder)
    sizes = {shape.height * shape.width for shape in config.data.shapes}
    if len(sizes) > 1 and config.noise.kind in SHIFTED:
        told = f"noise.kind is {config.noise.kind}, which depends on the size of the clips"
        raise ValueError(f"{told}, and data.buckets has {len(sizes)} sizes")


def _check_cache(config: RunConfig, loader: Loader, autoencoder: Autoencoder) -> None:
    """Refuse what other networks than those of frozen.path have made."""
    for source in loader.sources:
        origin = source.latents_origin
        if origin is not None and origin.autoencoder != (ours := autoencoder.fingerprint()):
            raise ValueError(
                f"the latents in {source.path} are of the autoencoder {origin.autoencoder}, and the one in "
                f"{config.frozen.path} is {ours}; tools/encode.py --frozen makes others"
            )
    if (context := loader.context) is None:
        return
    part = "text_encoder" if context == "text" else "image_encoder"
    encoder = fingerprint(frozen_folder(config.frozen.path), part)
    for source in loader.sources:
        assert source.embeddings_origin is not None, "states are read where all have them"
        if encoder is not None and encoder != (theirs := source.embeddings_origin.encoder(context)):
            raise ValueError(
                f"the CLIP states in {source.path} are of the {part} {theirs}, and the one in "
                f"{config.frozen.path} is {encoder}; tools/encode.py --frozen makes others"
            )


def _check_unet(config: RunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    latent, concat = autoencoder.latent_channels, conditioner.concat_channels(autoencoder)
    if config.model.in_channels != latent + concat:
        raise ValueError(
            f"model.in_channels is {config.model.in_channels}, but {latent} latent channels and "
            f"conditioning.concat={config.conditioning.concat} make {latent + concat}"
        )
    if config.model.context_width != conditioner.context_width:
        raise ValueError(
            f"model.context_width is {config.model.context_width}, but the encoder in {config.frozen.path} "
            f"gives tokens of width {conditioner.context_width}"
        )
    if config.model.num_scalars != conditioner.num_scalars:
        raise ValueError(
            f"model.num_scalars is {config.model.num_scalars}, but conditioning.scalars names "
            f"{conditioner.num_scalars}: {', '.join(config.conditioning.scalars)}"
        )


def _check_num_frames(config: RunConfig, shape: Shape) -> None:
    """Refuse clips of a length that the network or its conditions cannot have."""
    named = f"data.buckets.{shape}" if shape != config.data.shape else "data.num_frames"
    main = config.data.num_frames
    if (main == 1) != (config.model.temporal == "none") or (main == 1 < shape.num_frames):
        raise ValueError(
            f"{named} is {shape.num_frames} and model.temporal {config.model.temporal}: "
            "images, clips of one frame, go with temporal=none, and videos with layers of time"
        )
    if config.conditioning.uses_last_frame and shape.num_frames < 3:
        raise ValueError(f"{named} is {shape.num_frames}, but a clip whose ends condition it has at least 3")


def _check_conditions(config: RunConfig, loader: Loader) -> None:
    """Refuse signals that the network has no place for, or that the data do not hold."""
    told = config.conditioning
    if config.model.masked != (told.concat == "ends"):
        raise ValueError(
            f"model.masked is {str(config.model.masked).lower()} and conditioning.concat {told.concat}: a "
            "mask comes with ends, and with nothing else"
        )
    check_elevation(config, loader)


def check_elevation(config: RunConfig, loader: Loader) -> None:
    if "elevation" in config.conditioning.scalars:
        for sample in loader.samples():
            if sample.elevation is None:
                raise ValueError(
                    f"conditioning.scalars names elevation, which sample {sample.id} in "
                    f'{loader.config.set_names} does not have: its json needs the key "elevation", in degrees'
                )


def check_trainable(config: RunConfig, layers: Mapping[str, str]) -> None:
    """Refuse to freeze what begins at random or at zero: the tags of such layers, and what they would do."""
    for tag, would in sorted(layers.items()):
        if config.lora.rank or config.optim.lr_scale(tag) == 0:
            frozen = "lora.rank freezes" if config.lora.rank else f"optim.{tag}_lr_scale=0 freezes"
            raise ValueError(f"{frozen} {tag} layers that would {would}")


def check_scalars(config: RunConfig, path: Path, num_scalars: int) -> None:
    """Scalars are told apart by their place alone: those of the stage before, `num_scalars` of them, come
    first, in its order."""
    settings = run_settings(path)
    theirs = tuple(settings["conditioning"]["scalars"]) if settings else RELEASED_SCALARS[:num_scalars]
    ours = config.conditioning.scalars
    if any(before != now for before, now in zip(theirs, ours, strict=False)):
        raise ValueError(
            f"{path} takes the scalars {', '.join(theirs)}, and conditioning.scalars is {', '.join(ours)}: "
            "new ones come after those of the stage before, in its order"
        )
