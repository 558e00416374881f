"""LoRA files of other trainers: each format gives the same network, and others are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svd_ds.model.lora import merge_lora
from svd_ds.model.unet import UNet
from svd_ds.weights.io import merge_lora_file
from svd_ds.weights.lora import load_lora

RANK = 4
SCALE = 0.5
"""alpha / rank of the files."""
ATTENTION = "mid_block.attentions.0.temporal_transformer_blocks.0.attn1"
IN_ORIGINAL = "middle_block.1.time_stack.0.attn1"
LAYERS = ("to_q", "to_v", "to_out.0")
Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture
def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {layer: (draw(RANK, 64), draw(64, RANK)) for layer in LAYERS}


def expected(unet: UNet, pairs: Pairs, scale: float) -> dict[str, Tensor]:
    """The adapted layers' weights, computed layer by layer."""
    attention = unet.middle[0].transformer.temporal[0].attention
    qkv, out = attention.qkv.weight.detach().clone(), attention.out.weight.detach().clone()
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        if layer in pairs:
            a, b = pairs[layer]
            qkv.chunk(3)[part].add_(scale * b @ a)
    a, b = pairs["to_out.0"]
    return {"qkv": qkv, "out": out + scale * b @ a}


def assert_adapted(unet: UNet, weights: dict[str, Tensor]) -> None:
    attention = unet.middle[0].transformer.temporal[0].attention
    for name, weight in weights.items():
        torch.testing.assert_close(getattr(attention, name).weight.data, weight, rtol=1e-4, atol=1e-4)


def svd_xtend(pairs: Pairs, prefix: str = "unet.") -> dict[str, Tensor]:
    state = {}
    for layer, (a, b) in pairs.items():
        name = f"{prefix}{ATTENTION}.{layer}.lora"
        state |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
    return state


def attention_processors(pairs: Pairs) -> dict[str, Tensor]:
    state = {}
    for layer, (a, b) in pairs.items():
        name = f"unet.{ATTENTION}.processor.{layer.removesuffix('.0')}_lora"
        state |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
    return state


def kohya(pairs: Pairs, module: str = ATTENTION) -> dict[str, Tensor]:
    state = {}
    for layer, (a, b) in pairs.items():
        name = "lora_unet_" + f"{module}.{layer}".replace(".", "_")
        alpha = torch.tensor(SCALE * RANK)
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}
    return state


def peft(pairs: Pairs, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    state = {}
    for layer, (a, b) in pairs.items():
        name = f"{prefix}{ATTENTION}.{layer}"
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return state


LAYOUTS: dict[str, tuple[Callable[[Pairs], dict[str, Tensor]], float]] = {
    "train_svd_lora": (svd_xtend, 1.0),
    "no prefix": (lambda pairs: svd_xtend(pairs, ""), 1.0),
    "compiled": (lambda pairs: svd_xtend(pairs, "_orig_mod."), 1.0),
    "attention processors": (attention_processors, 1.0),
    "kohya": (kohya, SCALE),
    "kohya, original names": (lambda pairs: kohya(pairs, IN_ORIGINAL), SCALE),
    "peft": (peft, 1.0),
    "peft in a pipeline": (lambda pairs: peft(pairs, "unet.base_model.model."), 1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adapts_the_same_layers(unet: UNet, pairs: Pairs, layout: str, tmp_path: Path) -> None:
    write, scale = LAYOUTS[layout]
    save_file(write(pairs), tmp_path / "lora.safetensors")
    wanted, adapted = expected(unet, pairs, scale), copy.deepcopy(unet)
    merge_lora_file(unet, tmp_path / "lora.safetensors")
    assert_adapted(unet, wanted)
    load_lora(adapted, tmp_path / "lora.safetensors")
    merge_lora(adapted)
    assert_adapted(adapted, wanted)


def test_peft_settings_next_to_the_file_give_alpha(unet: UNet, pairs: Pairs, tmp_path: Path) -> None:
    save_file(peft(pairs), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    wanted = expected(unet, pairs, 8 / RANK * 0.5)
    merge_lora_file(unet, tmp_path, scale=0.5)
    assert_adapted(unet, wanted)


def test_layers_with_alphas_of_their_own_keep_them(unet: UNet, pairs: Pairs, tmp_path: Path) -> None:
    state = kohya(pairs)
    alphas = [key for key in state if key.endswith(".alpha")]
    for number, key in enumerate(alphas):
        state[key] = torch.tensor(2.0 * number + 1)
    save_file(state, tmp_path / "lora.safetensors")
    scaled = {
        layer: (a, b * (2.0 * number + 1) / RANK) for number, (layer, (a, b)) in enumerate(pairs.items())
    }
    wanted = expected(unet, scaled, 1.0)
    load_lora(unet, tmp_path / "lora.safetensors")
    merge_lora(unet)
    assert_adapted(unet, wanted)


def test_linear_layer_outside_attention_is_merged(unet: UNet, tmp_path: Path) -> None:
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{name}.lora_down.weight": a[..., None, None], f"{name}.lora_up.weight": b[..., None, None]}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors")
    weight = unet.middle[0].transformer.proj_in.weight
    wanted = weight.detach() + b @ a
    merge_lora_file(unet, tmp_path / "lora.safetensors")
    torch.testing.assert_close(weight.data, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "adapts no linear layer .*kohya"),
        ("unet.nothing.to_q.lora_A.weight", "adapts no linear layer"),
        ("unet.conv_in.weight", "is not a tensor of a LoRA: expected are unet.MODULE.lora_A.weight"),
        (f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.hada_w1_a", "adapters with hada are not plain LoRA"),
        (f"unet.{ATTENTION}.to_q.lora_magnitude_vector", "lora_magnitude_vector are not plain LoRA"),
        (f"unet.{ATTENTION}.to_k.lora.down.weight", "without its other half"),
    ],
)
def test_other_files_are_refused_by_their_content(unet: UNet, key: str, words: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 64)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=words):
        merge_lora_file(unet, tmp_path / "lora.safetensors")


ALONE = f"unet.{ATTENTION}.to_q"
IN_KOHYA = "lora_unet_" + f"{ATTENTION}.to_q".replace(".", "_")
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "ranks that differ": (
        {"lora_A": torch.ones(4, 64), "lora_B": torch.ones(64, 3)},
        r"lora_B.weight has the shape \(64, 3\), and the network takes \(64, 4\)",
    ),
    "no rank": (
        {"lora_A": torch.ones(0, 64), "lora_B": torch.ones(64, 0)},
        r"\(0, 64\): it has no elements",
    ),
    "numbers": (
        {"lora_A": torch.ones(()), "lora_B": torch.ones(())},
        r"lora_A.weight has the shape \(\), and the network takes \(\d+, 64\)",
    ),
    "vectors": (
        {"lora_A": torch.ones(4), "lora_B": torch.ones(4)},
        r"lora_A.weight has the shape \(4,\), and the network takes \(4, 64\)",
    ),
    "integers": (
        {"lora_A": torch.ones(4, 64, dtype=torch.int8), "lora_B": torch.ones(64, 4)},
        "lora_A.weight has the type torch.int8: weights of integers",
    ),
    "not finite": (
        {"lora_A": torch.ones(4, 64), "lora_B": torch.full((64, 4), float("nan"))},
        "lora_B.weight has a value that is not finite",
    ),
    "two adapters": (
        {"lora_A.one": torch.ones(4, 64), "lora_B.one": torch.ones(64, 4), "lora_A.two": torch.ones(4, 64)},
        "lora_A.one.weight and .*lora_A.two.weight: it must have one adapter a layer",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_matrices_are_refused_by_tensor(unet: UNet, kind: str, tmp_path: Path) -> None:
    halves, words = WRONG[kind]
    path = tmp_path / "lora.safetensors"
    save_file({f"{ALONE}.{name}.weight": value for name, value in halves.items()}, path)
    with pytest.raises(ValueError, match=rf"^{path}.*{words}"):
        merge_lora_file(unet, path)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.ones(2), r"to_q.alpha has the shape \(2,\): it must be one finite number"),
        (torch.tensor(float("nan")), "to_q.alpha .* must be one finite number"),
    ],
)
def test_alpha_must_be_one_finite_number(unet: UNet, alpha: Tensor, words: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    halves = {"lora_down.weight": torch.ones(4, 64), "lora_up.weight": torch.ones(64, 4), "alpha": alpha}
    save_file({f"{IN_KOHYA}.{name}": value for name, value in halves.items()}, path)
    with pytest.raises(ValueError, match=words):
        merge_lora_file(unet, path)


def test_alpha_without_its_adapter_is_refused(unet: UNet, pairs: Pairs, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(kohya(pairs) | {"lora_unet_absent.alpha": torch.ones(())}, path)
    with pytest.raises(ValueError, match=r"holds lora_unet_absent\.alpha without the adapter"):
        merge_lora_file(unet, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_adapters_are_added_at_full_precision(
    unet: UNet, pairs: Pairs, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in pairs.items()}
    save_file(peft(stored, "unet."), tmp_path / "lora.safetensors")
    wanted = expected(unet, {layer: (a.float(), b.float()) for layer, (a, b) in stored.items()}, 1.0)
    merge_lora_file(unet, tmp_path / "lora.safetensors")
    assert_adapted(unet, wanted)


@pytest.mark.parametrize("end", ["default", "camera-motion", "adapter_0"])
def test_named_adapter_of_peft_is_read(unet: UNet, pairs: Pairs, end: str, tmp_path: Path) -> None:
    state = {key.replace(".weight", f".{end}.weight"): value for key, value in peft(pairs).items()}
    save_file(state, tmp_path / "lora.safetensors")
    wanted = expected(unet, pairs, 1.0)
    merge_lora_file(unet, tmp_path / "lora.safetensors")
    assert_adapted(unet, wanted)


def test_alphas_by_module_and_rslora_scale_are_applied(unet: UNet, pairs: Pairs, tmp_path: Path) -> None:
    save_file(peft(pairs), tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"attn1.to_v": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    scaled = {layer: (a, b * (3 if layer == "to_v" else 1)) for layer, (a, b) in pairs.items()}
    wanted = expected(unet, scaled, 2 / RANK**0.5)
    merge_lora_file(unet, tmp_path)
    assert_adapted(unet, wanted)


def test_missing_file_and_a_pointer_are_named(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no LoRA file .*x\.safetensors"):
        merge_lora_file(unet, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"x\.safetensors is not .* Git LFS pointer"):
        merge_lora_file(unet, tmp_path / "x.safetensors")
