"""Weight files of unknown origin: indices that leave their folder, and invalid headers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from svd_ds.curate.models import load_pretrained
from svd_ds.model.frozen import load_frozen
from svd_ds.model.unet import UNet
from svd_ds.tensor_files import index_files
from svd_ds.weights.io import load_unet, merge_lora_file, save_unet
from svd_ds.weights.lora_files import HEADER
from svd_ds.weights.source import CONFIG_KEY
from tests.networks import SMALL

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
ADAPTED = "unet.mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q"


def make_targets(folder: Path) -> None:
    """Create files that a malicious index may name."""
    (folder / "pipe.safetensors").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    (folder / "sub").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "sub" / "x.safetensors")
    save_file({"a": torch.zeros(1)}, folder.parent / "outside.safetensors")


OUTSIDE = (
    *("/etc/passwd", "../outside.safetensors", "sub/../../outside.safetensors", "sub/x.safetensors", "", "."),
    *("..", "pipe.safetensors", "endless.safetensors", "absent.safetensors", "a\0b.safetensors"),
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", OUTSIDE)
def test_index_may_only_name_files_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    make_targets(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json lists .*, which is not a file in"):
        index_files(index)
    # Parts of a pipeline that a library loads are checked first.
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json lists|is not a regular file"):
        load_frozen(AutoencoderKLTemporalDecoder, tmp_path, "vae", "cpu", torch.float32)
    (folder / "pipe.safetensors").unlink()
    (folder / "endless.safetensors").unlink()
    index.rename(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"index\.json lists"):
        load_pretrained("CLIPModel", "CLIPProcessor", str(folder), "cpu")


@pytest.mark.timeout(60)
def test_pipe_among_weights_is_refused_without_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.mkfifo(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is not a regular file, but a pipe"):
        load_frozen(AutoencoderKLTemporalDecoder, tmp_path, "vae", "cpu", torch.float32)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("inside", [False, True])
def test_config_that_names_hub_code_is_refused(tmp_path: Path, key: str, inside: bool) -> None:
    folder = tmp_path / "image_encoder"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    fields: dict[str, Any] = {key: "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps({"text_config": fields} if inside else fields))
    with pytest.raises(ValueError, match=rf"config\.json names code of a hub, {key} somebody/kernel"):
        load_frozen(CLIPVisionModelWithProjection, tmp_path, "image_encoder", "cpu", torch.float32)
    with pytest.raises(ValueError, match="names code of a hub"):
        load_pretrained("CLIPModel", "CLIPProcessor", str(folder), "cpu")


def tensor(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_of(header: bytes | dict[str, Any], num_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_bytes)


HEADERS = {
    "empty file": b"",
    "header of 2^63 bytes": file_of(b"{}", length=2**63),
    "header beyond the end": file_of(b"{}", length=1000),
    "deeply nested": file_of(b'{"a":' + b"[" * 50_000),
    "overlap": file_of({FIRST: tensor(0, 8, 2), "b": tensor(4, 12, 2)}, 12),
    "hole": file_of({FIRST: tensor(0, 8, 2), "b": tensor(12, 20, 2)}, 20),
    "one name twice": file_of(
        b'{"a":%b,"a":%b}' % tuple(json.dumps(tensor(n, n + 8, 2)).encode() for n in (0, 8)), 16
    ),
    "shape that overflows": file_of({FIRST: tensor(0, 8, 2**40, 2**40)}, 8),
    "negative shape": file_of({FIRST: tensor(0, 8, -2)}, 8),
    "shape larger than the data": file_of({FIRST: tensor(0, 8, 2**30)}, 8),
    "unknown type": file_of({FIRST: tensor(0, 8, 2, dtype="F31")}, 8),
    "cut short": file_of({FIRST: tensor(0, 8, 2)}, 4),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_invalid_headers_are_refused_by_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises(ValueError, match=rf"{path} is not a safetensors file"):
        load_unet(path)


TEXTS = {
    "deeply nested": "[" * 100_000,
    "no object": "[]",
    "a number": "1e5",
    "no json": "x",
    "an unknown field": '{"a": 1}',
    "a type": '{"widths": 5}',
    "out of range": '{"widths": [1e9]}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_config_in_a_header_is_checked(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({FIRST: torch.zeros(1)}, path, {CONFIG_KEY: TEXTS[kind]})
    with pytest.raises(ValueError, match=rf"^{path}"):
        load_unet(path)


@pytest.mark.parametrize("fields", [[], {}, {"_class_name": "X"}, {"_class_name": None, "in_channels": []}])
@pytest.mark.parametrize("class_name", ["UNetSpatioTemporalConditionModel", "UNet2DConditionModel", None])
def test_config_without_required_fields_is_refused_by_file(
    tmp_path: Path, fields: Any, class_name: str | None
) -> None:
    if class_name and isinstance(fields, dict):
        fields = {**fields, "_class_name": class_name}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_unet(tmp_path)


SETTINGS = {
    "deeply nested": ("[" * 100_000, "is not JSON"),
    "no json": ("{", "is not JSON"),
    "no object": ("[1]", "no settings of adapters by name"),
    "alpha is a text": ('{"unet.lora_alpha": "8"}', "is 8: it must be a finite number"),
    "alpha is a list": ('{"lora_alpha": [1]}', r"is \[1\]: it must be a finite"),
    "alpha is infinite": ('{"lora_alpha": 1e999}', "is inf: it must be a finite"),
    "alpha beyond floats": ('{"lora_alpha": 1%s}' % ("0" * 400), "is 10000.*: it must be a finite"),
    "patterns are a list": ('{"alpha_pattern": [1]}', r"alpha_pattern is \[1\]: it must be"),
    "DoRA": ('{"use_dora": true}', "has use_dora: such adapters are not plain LoRA"),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("separate", [False, True])
def test_settings_of_adapters_are_checked(tmp_path: Path, kind: str, separate: bool) -> None:
    path, (text, words) = tmp_path / "x.safetensors", SETTINGS[kind]
    state = {f"{ADAPTED}.lora_A.weight": torch.zeros(1, 64), f"{ADAPTED}.lora_B.weight": torch.zeros(64, 1)}
    save_file(state, path, None if separate else {HEADER: text})
    if separate:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/.*{words}"):
        merge_lora_file(UNet(SMALL), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_weights_are_read_exactly(unet: UNet, dtype: torch.dtype, tmp_path: Path) -> None:
    save_unet(unet, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert torch.equal(load_unet(tmp_path).conv_out.weight, unet.conv_out.weight.to(dtype).float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor.to(torch.int8), "has the type torch.int8: weights of integers"),
        (lambda tensor: tensor.fill_(float("nan")), "has a value that is not finite"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("inf")), "is not finite"),
    ],
)
def test_integers_and_values_that_are_not_finite_are_refused(
    unet: UNet, change: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    save_unet(unet, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = change(tensors["conv_out.bias"])
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{file}: conv_out\.bias .*{words}"):
        load_unet(tmp_path)
