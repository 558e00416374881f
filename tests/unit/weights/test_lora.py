"""Adapters are saved in diffusers' format, and loaded exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svd_ds.model.lora import LoraConfig, add_lora, merge_lora
from svd_ds.model.unet import UNet
from svd_ds.weights.lora import load_lora, save_lora
from svd_ds.weights.lora_files import HEADER
from tests.networks import SMALL, forward_lora, randomize_adapters

LORA = LoraConfig(rank=4, alpha=8.0)


def test_saved_file_has_diffusers_format_and_loads_exactly(unet: UNet, tmp_path: Path) -> None:
    plain = copy.deepcopy(unet)
    randomize_adapters(unet, add_lora(unet, LORA))
    save_lora(unet, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()[HEADER])
        modules = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    assert settings["unet.r"] == 4 and settings["unet.lora_alpha"] == 8.0
    assert set(settings["unet.target_modules"]) == modules

    from diffusers import UNetSpatioTemporalConditionModel

    from svd_ds.weights.public_configs import config_to_diffusers

    public = UNetSpatioTemporalConditionModel.from_config(config_to_diffusers(SMALL))
    assert all(isinstance(public.get_submodule(module), nn.Linear) for module in modules)

    names = load_lora(plain, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert set(names) == {name for name, _ in unet.named_parameters() if ".lora." in name}
    assert torch.equal(forward_lora(plain), forward_lora(unet))


def test_file_without_a_header_may_adapt_a_part_of_a_layer(unet: UNet, tmp_path: Path) -> None:
    module = "mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_v"
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    save_file(
        {f"unet.{module}.lora_A.weight": a, f"unet.{module}.lora_B.weight": b}, tmp_path / "v.safetensors"
    )
    weight = unet.middle[0].transformer.temporal[0].attention.qkv.weight
    before = weight.detach().clone()
    load_lora(unet, tmp_path / "v.safetensors")
    merge_lora(unet)
    gained = (weight.detach() - before).chunk(3)
    assert not gained[0].any() and not gained[1].any()
    torch.testing.assert_close(gained[2], b @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.update({"unet.conv_in.lora_A.weight": torch.zeros(4, 8)}),
            "unet.conv_in.lora_A.weight",
        ),
        (lambda state: state.update({key: state[key][:, :3] for key in state if "_B" in key}), r"\(32, 3\)"),
        (
            lambda state: state.update({next(iter(state)): torch.zeros(3, 32)}),
            r"shape \(32, 4\), .* takes \(32, 3\)",
        ),
    ],
)
def test_file_of_another_network_is_refused(
    unet: UNet, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    adapted = copy.deepcopy(unet)
    add_lora(adapted, LORA)
    save_lora(adapted, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=words):
        load_lora(unet, tmp_path / "lora.safetensors")


def test_network_without_adapters_is_not_saved(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to write"):
        save_lora(unet, tmp_path / "lora.safetensors")
