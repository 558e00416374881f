"""Adapters change nothing at first, learn alone, merge exactly, and travel in the public format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svd_ds.model.lora import (
    HEADER,
    TARGETS,
    LoraConfig,
    add_lora,
    load_lora,
    lora_state,
    merge_lora,
    save_lora,
)
from svd_ds.model.unet import UNet
from tests.networks import SMALL

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def unet(randomize: Callable[[nn.Module], UNet]) -> UNet:
    return randomize(UNet(SMALL))


def output(unet: UNet, tokens: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(2, 3, 8, 4, 4, generator=generator),
        torch.randn(2, tokens, 48, generator=generator),
    )
    return unet(x, torch.tensor([-0.5, 0.5]), context, torch.rand(2, 3, generator=generator))


def randomize_adapters(unet: UNet, names: list[str]) -> None:
    parameters = dict(unet.named_parameters())
    for name in names:
        nn.init.normal_(parameters[name], std=0.1)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_changes_at_first_and_the_adapters_alone_learn(unet: UNet, target: str) -> None:
    before = output(unet)
    known = dict(unet.named_parameters())
    names = add_lora(unet, replace(LORA, target=target))
    parameters = dict(unet.named_parameters())
    assert parameters.keys() - known.keys() == set(names), "the network's own names stay"
    assert torch.equal(output(unet), before)

    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    output(unet).square().mean().backward()
    for name in names:  # A learns once B is no longer zero
        assert parameters[name].grad is not None and bool(parameters[name].grad.any()) == name.endswith("b")
    randomize_adapters(unet, names)
    output(unet).square().mean().backward()
    assert all(parameters[name].grad.any() for name in names)
    assert all(parameters[name].grad is None for name in known)


def test_targets_are_what_they_say(unet: UNet) -> None:
    layers = {}
    for target in TARGETS:
        adapted = copy.deepcopy(unet)
        add_lora(adapted, replace(LORA, target=target))
        layers[target] = {name.rpartition(".lora_")[0] for name in lora_state(adapted)}
    time, space, both = layers.values()
    transformers = 4  # one on the way down, one in the middle, two on the way up
    assert len(time) == len(space) == 4 * transformers and len(both) == 16 * transformers
    assert all(".temporal_transformer_blocks.0.attn1.to_" in name for name in time)
    assert all(".transformer_blocks.0.attn1.to_" in name for name in space)
    assert time | space < both and any(".attn2.to_" in name for name in both)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_merging_equals_adapting(unet: UNet, target: str, tokens: int) -> None:
    plain = output(unet, tokens)
    randomize_adapters(unet, add_lora(unet, replace(LORA, target=target)))
    adapted = output(unet, tokens)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    names = [name for name, _ in UNet(SMALL).named_parameters()]
    merge_lora(unet)
    assert [name for name, _ in unet.named_parameters()] == names
    torch.testing.assert_close(output(unet, tokens), adapted, rtol=1e-4, atol=1e-4)


def test_a_public_layers_update_is_its_own_b_times_a(unet: UNet) -> None:
    before = copy.deepcopy(unet.middle[0].transformer.temporal[0].attention.qkv.weight)
    randomize_adapters(unet, add_lora(unet, LORA))
    state = lora_state(unet)
    merge_lora(unet)
    gained = unet.middle[0].transformer.temporal[0].attention.qkv.weight - before
    for part, letter in zip(gained.chunk(3), "qkv", strict=True):
        key = f"unet.mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_{letter}"
        a, b = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
        assert a.shape == (4, 64) and b.shape == (64, 4)
        torch.testing.assert_close(part, 2.0 * b @ a, rtol=1e-4, atol=1e-5)


def test_files_are_as_diffusers_has_them(unet: UNet, tmp_path: Path) -> None:
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
    assert torch.equal(output(plain), output(unet))


def test_a_file_without_a_header_that_adapts_a_part(unet: UNet, tmp_path: Path) -> None:
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
def test_another_networks_file_is_refused(
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


def test_nonsense_is_refused(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.target is 'norms': it must be one of temporal_attention"):
        LoraConfig(target="norms")
    with pytest.raises(ValueError, match=r"lora.rank is -1"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match="no adapters to write"):
        save_lora(unet, tmp_path / "lora.safetensors")
    assert add_lora(unet, LoraConfig(rank=0)) == []
    add_lora(unet, LORA)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(unet, LORA)
