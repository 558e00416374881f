"""UNetConfig from and to the public layouts: diffusers' config.json, and the tensor shapes of sgm's file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from svd_ds.model.unet import UNetConfig
from svd_ds.weights.public_names import ORIGINAL_PREFIX

VIDEO_CLASS, IMAGE_CLASS = "UNetSpatioTemporalConditionModel", "UNet2DConditionModel"


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """Return the config.json of diffusers' UNetSpatioTemporalConditionModel for a network.

    Raises:
        ValueError: diffusers has no such network.
    """
    if config.num_scalars == 0:
        raise ValueError(
            f"model.num_scalars is 0, but diffusers' {VIDEO_CLASS} always takes scalars: save the network in "
            "the original layout"
        )
    if config.temporal == "none":
        raise ValueError(
            f"model.temporal is none, but diffusers' {VIDEO_CLASS} has temporal layers: save the network in "
            "the original layout"
        )
    kinds = ["CrossAttn" if attends else "" for attends in config.attention_levels]
    # `masked` is a field of ours, written only if it is true: diffusers has no masked network.
    masked = {"masked": True} if config.masked else {}
    return {
        "_class_name": VIDEO_CLASS,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_layers,
        "transformer_layers_per_block": config.transformer_depth,
        "cross_attention_dim": config.context_width,
        "num_attention_heads": [width // config.head_width for width in config.widths],
        "addition_time_embed_dim": config.scalar_width,
        "projection_class_embeddings_input_dim": config.num_scalars * config.scalar_width,
        "num_frames": config.num_frames,
        **masked,
    }


def config_from_diffusers(fields: dict[str, Any]) -> UNetConfig:
    """Return the UNetConfig of a diffusers config.json; an image UNet gets temporal layers.

    Raises:
        ValueError: the network is of another class, or no UNetConfig describes it.
    """
    kind = fields.get("_class_name")
    if kind not in (VIDEO_CLASS, IMAGE_CLASS):
        raise ValueError(f"its class is {kind}, not {VIDEO_CLASS} or {IMAGE_CLASS}")
    video = kind == VIDEO_CLASS
    if not video and not fields.get("use_linear_projection"):
        raise ValueError("its use_linear_projection is false: it must be true, as in Stable Diffusion 2")
    widths = fields["block_out_channels"]
    # diffusers' image UNet calls the number of heads attention_head_dim.
    heads = fields["num_attention_heads"] if video else fields["attention_head_dim"]
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    head_widths = {width // number for width, number in zip(widths, heads, strict=True)}
    if len(head_widths) > 1:
        raise ValueError(f"its attention heads have different widths, {sorted(head_widths)}")
    scalar_width = fields["addition_time_embed_dim"] if video else UNetConfig.scalar_width
    return UNetConfig(
        in_channels=fields["in_channels"],
        masked=fields.get("masked", False),
        out_channels=fields["out_channels"],
        widths=tuple(widths),
        num_layers=_single_value(fields, "layers_per_block"),
        attention_levels=tuple("CrossAttn" in block for block in fields["down_block_types"]),
        transformer_depth=_single_value(fields, "transformer_layers_per_block", default=1),
        context_width=_single_value(fields, "cross_attention_dim"),
        head_width=head_widths.pop(),
        num_scalars=fields["projection_class_embeddings_input_dim"] // scalar_width if video else 0,
        scalar_width=scalar_width,
        num_frames=fields.get("num_frames", UNetConfig.num_frames),
    )


def _single_value(fields: dict[str, Any], key: str, default: int = 0) -> int:
    """Return a field that diffusers may list level by level, which must be equal at all of them."""
    value = fields.get(key, default)
    values = value if isinstance(value, list) else [value]
    if len(set(values)) > 1:
        raise ValueError(f"its {key} differs from level to level, {values}")
    return int(values[0])


def config_from_original(shapes: Mapping[str, Sequence[int]]) -> UNetConfig:
    """Return the UNetConfig of tensor shapes under sgm's names.

    The shapes do not determine the widths of heads and of scalar embeddings: those of the public models are
    assumed.

    Raises:
        ValueError: the tensors are not those of a UNet of this family.
    """

    def shape(name: str) -> Sequence[int]:
        if ORIGINAL_PREFIX + name not in shapes:
            raise ValueError(f"it has no tensor {ORIGINAL_PREFIX}{name}")
        return shapes[ORIGINAL_PREFIX + name]

    def present(name: str) -> bool:
        return ORIGINAL_PREFIX + name in shapes

    levels: list[list[int]] = [[]]
    for step in itertools.count(1):
        if present(f"input_blocks.{step}.0.op.weight"):
            levels.append([])
        elif present(f"input_blocks.{step}.0.in_layers.0.weight"):
            levels[-1].append(step)
        else:
            break
    if not all(levels):
        raise ValueError("it has a level without residual blocks")
    scalars = shape("label_emb.0.0.weight")[1] if present("label_emb.0.0.weight") else 0
    depth = itertools.takewhile(
        lambda index: present(f"middle_block.1.transformer_blocks.{index}.norm1.weight"), itertools.count()
    )
    return UNetConfig(
        in_channels=shape("input_blocks.0.0.weight")[1],
        masked=present("mask_embedding.weight"),
        out_channels=shape("out.2.weight")[0],
        widths=tuple(shape(f"input_blocks.{level[0]}.0.out_layers.3.weight")[0] for level in levels),
        num_layers=len(levels[0]),
        attention_levels=tuple(present(f"input_blocks.{level[0]}.1.norm.weight") for level in levels),
        transformer_depth=len(list(depth)),
        context_width=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        num_scalars=scalars // UNetConfig.scalar_width,
    )
