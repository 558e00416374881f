"""Checks before the training begins: the network fits its frozen parts, conditions, data and previous stage.

Each check raises ValueError with one sentence that names the config key and both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svd_ds.config import RunConfig
from svd_ds.data.config import Shape
from svd_ds.data.loader import Loader
from svd_ds.diffusion.noise import SHIFTED
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.model.frozen import fingerprint
from svd_ds.sample import frozen_folder, run_settings
from svd_ds.scalars import RELEASED_SCALARS, SCALARS


def check_config_fits(
    config: RunConfig, loader: Loader, autoencoder: Autoencoder, conditioner: Conditioner | None
) -> None:
    """Check that the network fits its frozen parts, conditions and data.

    Args:
        conditioner: None for a task without conditions.

    Raises:
        ValueError: it does not fit.
    """
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
        raise ValueError(
            f"noise.kind is {config.noise.kind}, which depends on the size of the clips, and data.buckets "
            f"has {len(sizes)} sizes"
        )


def _check_cache(config: RunConfig, loader: Loader, autoencoder: Autoencoder) -> None:
    """Check that cached latents and CLIP embeddings were computed by the networks of frozen.path."""
    for source in loader.sources:
        origin = source.latents_origin
        if origin is not None and origin.autoencoder != (ours := autoencoder.fingerprint()):
            raise ValueError(
                f"the latents in {source.path} were computed by the autoencoder {origin.autoencoder}, and "
                f"that in frozen.path={config.frozen.path} is {ours}: compute them again by "
                "tools/encode.py --frozen"
            )
    if (context := loader.context) is None:
        return
    part = "text_encoder" if context == "text" else "image_encoder"
    encoder = fingerprint(frozen_folder(config.frozen.path), part)
    for source in loader.sources:
        assert source.embeddings_origin is not None, "embeddings are read if all sources have them"
        if encoder is not None and encoder != (theirs := source.embeddings_origin.encoder(context)):
            raise ValueError(
                f"the CLIP embeddings in {source.path} were computed by the {part} {theirs}, and that in "
                f"frozen.path={config.frozen.path} is {encoder}: compute them again by "
                "tools/encode.py --frozen"
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
            f"model.context_width is {config.model.context_width}, but the encoder in "
            f"frozen.path={config.frozen.path} gives tokens of width {conditioner.context_width}"
        )
    if config.model.num_scalars != conditioner.num_scalars:
        raise ValueError(
            f"model.num_scalars is {config.model.num_scalars}, but conditioning.scalars names "
            f"{conditioner.num_scalars}: {', '.join(config.conditioning.scalars)}"
        )


def _check_num_frames(config: RunConfig, shape: Shape) -> None:
    """Check that the network and its conditions accept clips of this length."""
    named = f"data.buckets.{shape}" if shape != config.data.shape else "data.num_frames"
    main = config.data.num_frames
    if (main == 1) != (config.model.temporal == "none") or (main == 1 < shape.num_frames):
        raise ValueError(
            f"{named} is {shape.num_frames} and model.temporal is {config.model.temporal}: it must be none "
            "for images (clips of 1 frame), and must not be none for videos"
        )
    if config.conditioning.uses_last_frame and shape.num_frames < 3:
        raise ValueError(
            f"{named} is {shape.num_frames}: with the first and the last frame as conditions it must be at "
            "least 3"
        )


def _check_conditions(config: RunConfig, loader: Loader) -> None:
    """Check that the network has inputs for its conditions, and that the data and `sampling` have values."""
    concat = config.conditioning.concat
    if config.model.masked != (concat == "ends"):
        raise ValueError(
            f"model.masked is {str(config.model.masked).lower()} and conditioning.concat is {concat}: "
            "model.masked must be true with ends, and false otherwise"
        )
    for name in config.conditioning.scalars:
        if name not in config.sampling.scalar_values():
            raise ValueError(f"conditioning.scalars names {name}: sampling.scalars.{name} must be given")
    check_sample_scalars(config, loader)


def check_sample_scalars(config: RunConfig, loader: Loader) -> None:
    """Check that every sample has the scalars of `conditioning.scalars` that are read from samples.

    Raises:
        ValueError: a sample lacks one that has no default, or its value is outside the scalar's range.
    """
    read = [SCALARS[name] for name in config.conditioning.scalars if SCALARS[name].sample_field]
    for sample in loader.samples() if read else ():
        for scalar in read:
            assert scalar.sample_field is not None
            value, data = sample.number(scalar.sample_field), loader.config.set_names
            unit = f", in {scalar.unit}" if scalar.unit else ""
            if value is None and scalar.sample_default is None:
                raise ValueError(
                    f"conditioning.scalars names {scalar.name}, which sample {sample.id} in {data} does not "
                    f'have: its json needs the key "{scalar.sample_field}"{unit}'
                )
            if value is not None and (wrong := scalar.check(value)):
                raise ValueError(
                    f"conditioning.scalars names {scalar.name}, and {scalar.sample_field} of sample "
                    f"{sample.id} in {data} is {value:g}: it must be {wrong}{unit}"
                )


def check_trainable(config: RunConfig, layers: Mapping[str, str]) -> None:
    """Check that no layer is frozen that starts at random or at zero.

    Args:
        layers: tag of such layers -> the consequence, which completes the sentence "... layers that would".

    Raises:
        ValueError: `lora.rank` or a learning rate scale of 0 freezes such layers.
    """
    for tag, consequence in sorted(layers.items()):
        if config.lora.rank or config.optim.lr_scale(tag) == 0:
            frozen = "lora.rank freezes" if config.lora.rank else f"optim.{tag}_lr_scale=0 freezes"
            raise ValueError(f"{frozen} {tag} layers that would {consequence}")


def check_scalar_order(config: RunConfig, path: Path, num_scalars: int) -> None:
    """Check that the scalars of the previous stage come first and in its order.

    The weights of the scalars' embedding are identified only by this order.

    Args:
        path: previous stage, init.from.
        num_scalars: number of its scalars.

    Raises:
        ValueError: `conditioning.scalars` has another order.
    """
    settings = run_settings(path)
    theirs = tuple(settings["conditioning"]["scalars"]) if settings else RELEASED_SCALARS[:num_scalars]
    ours = config.conditioning.scalars
    if any(before != now for before, now in zip(theirs, ours, strict=False)):
        raise ValueError(
            f"{path} takes the scalars {', '.join(theirs)}, and conditioning.scalars is {', '.join(ours)}: "
            "new ones must come after those of the previous stage, in its order"
        )
