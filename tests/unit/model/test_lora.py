"""Adapters change no output at first, are the only parameters with gradients, and merge exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from svd_ds.model.lora import TARGETS, LoraConfig, add_lora, merge_lora
from svd_ds.model.unet import UNet
from svd_ds.weights.lora import lora_state
from tests.networks import SMALL, forward_lora, randomize_adapters

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.mark.parametrize("target", TARGETS)
def test_new_adapters_change_no_output_and_alone_get_gradients(unet: UNet, target: str) -> None:
    before = forward_lora(unet)
    known = dict(unet.named_parameters())
    names = add_lora(unet, replace(LORA, target=target))
    parameters = dict(unet.named_parameters())
    assert names and parameters.keys() - known.keys() == set(names), "the network's own names stay"
    assert torch.equal(forward_lora(unet), before)

    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    forward_lora(unet).square().mean().backward()
    for name in names:  # A learns once B is no longer zero
        assert parameters[name].grad is not None and bool(parameters[name].grad.any()) == name.endswith("b")
    randomize_adapters(unet, names)
    forward_lora(unet).square().mean().backward()
    assert all(parameters[name].grad.any() for name in names)
    assert all(parameters[name].grad is None for name in known)


def test_target_selects_its_attention_layers(unet: UNet) -> None:
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
def test_merged_network_equals_adapted_one(unet: UNet, target: str, tokens: int) -> None:
    plain = forward_lora(unet, tokens)
    randomize_adapters(unet, add_lora(unet, replace(LORA, target=target)))
    adapted = forward_lora(unet, tokens)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    names = [name for name, _ in UNet(SMALL).named_parameters()]
    merge_lora(unet)
    assert [name for name, _ in unet.named_parameters()] == names
    torch.testing.assert_close(forward_lora(unet, tokens), adapted, rtol=1e-4, atol=1e-4)


def test_update_of_a_public_layer_is_b_times_a(unet: UNet) -> None:
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


def test_invalid_configs_and_second_adapters_are_refused(unet: UNet) -> None:
    with pytest.raises(ValueError, match=r"lora.target is 'norms': it must be one of temporal_attention"):
        LoraConfig(target="norms")
    with pytest.raises(ValueError, match=r"lora.rank is -1"):
        LoraConfig(rank=-1)
    assert add_lora(unet, LoraConfig(rank=0)) == []
    add_lora(unet, LORA)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(unet, LORA)
