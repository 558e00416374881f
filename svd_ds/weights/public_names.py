"""Our parameter names and the two public layouts: sgm's single file ("original") and a diffusers folder.

The tables below are the complete mapping, used in both directions. A row is a module of ours and its public
counterpart in each layout; parameter names (`weight`, `bias`, `mix_factor`) are the same everywhere. If a
public entry is a tuple, our parameter is these public tensors joined along dimension 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from svd_ds.model.unet import UNetConfig

LAYOUTS = ("diffusers", "original")
ORIGINAL_PREFIX = "model.diffusion_model."

Row = tuple[str, str | tuple[str, ...], str | tuple[str, ...]]

ENDS: tuple[Row, ...] = (
    ("embedding.time.linear1", "time_embedding.linear_1", "time_embed.0"),
    ("embedding.time.linear2", "time_embedding.linear_2", "time_embed.2"),
    ("embedding.scalars.linear1", "add_embedding.linear_1", "label_emb.0.0"),
    ("embedding.scalars.linear2", "add_embedding.linear_2", "label_emb.0.2"),
    # No public network has a mask embedding: it has our name in every layout.
    ("mask_embedding", "mask_embedding", "mask_embedding"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    ("norm_out", "conv_norm_out", "out.0"),
    ("conv_out", "conv_out", "out.2"),
)
RESIDUAL: tuple[Row, ...] = (
    ("spatial.norm1", "spatial_res_block.norm1", "in_layers.0"),
    ("spatial.conv1", "spatial_res_block.conv1", "in_layers.2"),
    ("spatial.time_projection", "spatial_res_block.time_emb_proj", "emb_layers.1"),
    ("spatial.norm2", "spatial_res_block.norm2", "out_layers.0"),
    ("spatial.conv2", "spatial_res_block.conv2", "out_layers.3"),
    ("spatial.shortcut", "spatial_res_block.conv_shortcut", "skip_connection"),
    ("temporal.norm1", "temporal_res_block.norm1", "time_stack.in_layers.0"),
    ("temporal.conv1", "temporal_res_block.conv1", "time_stack.in_layers.2"),
    ("temporal.time_projection", "temporal_res_block.time_emb_proj", "time_stack.emb_layers.1"),
    ("temporal.norm2", "temporal_res_block.norm2", "time_stack.out_layers.0"),
    ("temporal.conv2", "temporal_res_block.conv2", "time_stack.out_layers.3"),
    ("alpha", "time_mixer", "time_mixer"),
)
TRANSFORMER: tuple[Row, ...] = (
    ("norm", "norm", "norm"),
    ("proj_in", "proj_in", "proj_in"),
    ("positions.mlp.linear1", "time_pos_embed.linear_1", "time_pos_embed.0"),
    ("positions.mlp.linear2", "time_pos_embed.linear_2", "time_pos_embed.2"),
    ("alpha", "time_mixer", "time_mixer"),
    ("proj_out", "proj_out", "proj_out"),
)
TRANSFORMER_STACKS = (
    ("spatial", "transformer_blocks", "transformer_blocks"),
    ("temporal", "temporal_transformer_blocks", "time_stack"),
)
TRANSFORMER_BLOCK: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("feed_forward_in.norm", "norm_in"),
    ("feed_forward_in.proj_in", "ff_in.net.0.proj"),
    ("feed_forward_in.proj_out", "ff_in.net.2"),
    ("attention.norm", "norm1"),
    ("attention.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attention.out", "attn1.to_out.0"),
    ("cross.norm", "norm2"),
    ("cross.q", "attn2.to_q"),
    ("cross.kv", ("attn2.to_k", "attn2.to_v")),
    ("cross.out", "attn2.to_out.0"),
    ("feed_forward.norm", "norm3"),
    ("feed_forward.proj_in", "ff.net.0.proj"),
    ("feed_forward.proj_out", "ff.net.2"),
)


def public_names(parameter: str, modules: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the public tensors that, joined along dimension 0, are our parameter.

    Args:
        parameter: our name.
        modules: the result of `public_modules`.
    """
    module, leaf = parameter.rsplit(".", 1)
    return tuple(f"{public}.{leaf}" for public in modules[module])


def to_public(parameter: str, tensor: Tensor) -> Tensor:
    """Return our parameter, or a part of it, in the order of the public layouts: a view.

    Public convolutions are (out, in, *kernel), with the kernel 3 x 1 x 1 over time and 1 x 1 in shortcuts.
    """
    if ".temporal.conv" in parameter and tensor.dim() == 4:
        return tensor.permute(0, 3, 1, 2)[..., None]
    if tensor.dim() == 4:
        return tensor.permute(0, 3, 1, 2)
    if parameter.endswith(".shortcut.weight"):
        return tensor[..., None, None]
    return tensor


def from_public(parameter: str, tensor: Tensor) -> Tensor:
    """Return a public tensor in our order: the inverse of `to_public`."""
    if tensor.dim() == 5:
        return tensor[..., 0].permute(0, 2, 3, 1)
    if parameter.endswith(".shortcut.weight"):
        return tensor[..., 0, 0]
    if tensor.dim() == 4:
        return tensor.permute(0, 2, 3, 1)
    return tensor


def public_modules(config: UNetConfig, layout: str) -> dict[str, tuple[str, ...]]:
    """Return our module -> its public modules, for a network of a config.

    Raises:
        ValueError: `layout` is not one of LAYOUTS, or the network has temporal layers other than SVD's.
    """
    if config.temporal not in ("svd", "none"):
        raise ValueError(
            f"model.temporal is {config.temporal}: no public layout has these layers, only the checkpoints "
            "of a run"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"the layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    column = 1 + LAYOUTS.index(layout)
    prefix = ORIGINAL_PREFIX if layout == "original" else ""
    modules = {}
    for paths, rows in [(("", "", ""), ENDS), *_blocks(config)]:
        for row in rows:
            modules[paths[0] + row[0]] = tuple(
                prefix + paths[column] + name for name in _as_tuple(row[column])
            )
    return modules


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _blocks(config: UNetConfig) -> Iterator[tuple[tuple[str, str, str], tuple[Row, ...]]]:
    """Yield, for every block of the network, its path in the three layouts and the table of its modules."""
    transformer = _transformer_rows(config.transformer_depth)
    levels = len(config.widths)
    step = 0
    for level in range(levels):
        for index in range(config.num_layers):
            ours, theirs, original = f"encoder.{step}", f"down_blocks.{level}", f"input_blocks.{step + 1}"
            yield (f"{ours}.residual.", f"{theirs}.resnets.{index}.", f"{original}.0."), RESIDUAL
            yield (f"{ours}.transformer.", f"{theirs}.attentions.{index}.", f"{original}.1."), transformer
            step += 1
        ours, theirs, original = f"encoder.{step}", f"down_blocks.{level}", f"input_blocks.{step + 1}"
        yield (f"{ours}.resize.", f"{theirs}.downsamplers.0.", f"{original}.0."), (("conv", "conv", "op"),)
        step += 1

    yield ("middle.0.residual.", "mid_block.resnets.0.", "middle_block.0."), RESIDUAL
    yield ("middle.0.transformer.", "mid_block.attentions.0.", "middle_block.1."), transformer
    yield ("middle.1.residual.", "mid_block.resnets.1.", "middle_block.2."), RESIDUAL

    for step in range(levels * (config.num_layers + 1)):
        up, index = divmod(step, config.num_layers + 1)
        ours, theirs, original = f"decoder.{step}", f"up_blocks.{up}", f"output_blocks.{step}"
        upsample = 2 if config.attention_levels[levels - 1 - up] else 1
        yield (f"{ours}.residual.", f"{theirs}.resnets.{index}.", f"{original}.0."), RESIDUAL
        yield (f"{ours}.transformer.", f"{theirs}.attentions.{index}.", f"{original}.1."), transformer
        yield (
            (f"{ours}.resize.", f"{theirs}.upsamplers.0.", f"{original}.{upsample}."),
            (("conv", "conv", "conv"),),
        )


def _transformer_rows(depth: int) -> tuple[Row, ...]:
    rows = list(TRANSFORMER)
    for index in range(depth):
        for ours, theirs, original in TRANSFORMER_STACKS:
            for module, public in TRANSFORMER_BLOCK:
                in_diffusers = tuple(f"{theirs}.{index}.{name}" for name in _as_tuple(public))
                in_original = tuple(f"{original}.{index}.{name}" for name in _as_tuple(public))
                rows.append((f"{ours}.{index}.{module}", in_diffusers, in_original))
    return tuple(rows)
