"""Weights are loaded exactly, from the public layouts and from shards of a run; wrong files are refused."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svd_ds
from svd_ds import fsync_io
from svd_ds.model.lora import LoraConfig, add_lora
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.weights.io import load_unet, read_weights, save_unet, write_weights
from svd_ds.weights.lora import save_lora
from svd_ds.weights.public_names import public_modules, public_names, to_public
from tests.networks import SMALL, assert_same, save_checkpoint

ROOT = Path(__file__).parents[3]
PUBLIC_HEADS = replace(SMALL, widths=(64, 128), head_width=64, scalar_width=256, num_frames=14)
"""Config that shapes determine: widths of heads and scalar embeddings are the public models'."""


class TestPublicLayouts:
    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_saved_weights_are_loaded_bit_by_bit(self, layout: str, unet: UNet, tmp_path: Path) -> None:
        path = tmp_path / ("folder" if layout == "diffusers" else "file.safetensors")
        svd_ds.save_unet(unet, path, layout)
        assert_same(svd_ds.load_unet(path), unet)

    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_masked_network_keeps_its_embedding(self, layout: str, randomize: Any, tmp_path: Path) -> None:
        masked = randomize(UNet(replace(SMALL, in_channels=9, masked=True)))
        path = tmp_path / ("folder" if layout == "diffusers" else "file.safetensors")
        save_unet(masked, path, layout)
        assert_same(load_unet(path), masked)

    @pytest.mark.parametrize("in_channels", [4, 8])
    def test_masked_network_starts_with_the_output_of_its_initial_weights(
        self, in_channels: int, randomize: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The outputs are equal if every frame is given."""
        before = randomize(UNet(replace(SMALL, in_channels=in_channels)))
        save_unet(before, tmp_path)
        unet = load_unet(tmp_path, config=replace(SMALL, in_channels=9, masked=True))
        assert "mask_embedding.weight" in caplog.text and "1 tensors" in caplog.text
        assert not unet.mask_embedding.weight.any()
        weight = unet.conv_in.weight
        assert torch.equal(weight[..., :in_channels], before.conv_in.weight)
        assert not weight[..., in_channels:].any()
        x, mask = torch.randn(1, 3, in_channels, 4, 4), torch.ones(1, 3, 1, 4, 4)
        wide = torch.cat([x, torch.randn(1, 3, 8 - in_channels, 4, 4), mask], dim=2)
        rest = (torch.randn(1), torch.randn(1, 2, 48), torch.tensor([[6.0, 127.0, 0.02]]))
        torch.testing.assert_close(unet(wide, *rest), before(x, *rest))

    def test_conversion_to_the_other_layout_and_back_is_exact(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet, tmp_path / "a.safetensors", "original")
        write_weights(*read_weights(tmp_path / "a.safetensors"), tmp_path / "b", "diffusers")
        write_weights(*read_weights(tmp_path / "b"), tmp_path / "c.safetensors", "original")
        first, last = (load_file(tmp_path / name) for name in ("a.safetensors", "c.safetensors"))
        assert first.keys() == last.keys()
        assert all(torch.equal(first[name], last[name]) for name in first)

    def test_diffusers_loads_the_files_and_computes_the_same(self, unet: UNet, tmp_path: Path) -> None:
        from diffusers import UNetSpatioTemporalConditionModel

        save_unet(unet, tmp_path / "unet")
        public = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet")
        x, context = torch.randn(1, 3, 8, 4, 4), torch.randn(1, 2, 48)
        inputs = (x, torch.randn(1), context, torch.tensor([[6.0, 127.0, 0.02]]))
        torch.testing.assert_close(public(*inputs).sample, unet(*inputs), rtol=1e-4, atol=1e-4)

    def test_files_saved_by_diffusers_are_read(
        self, public_unet: Any, from_public: Any, tmp_path: Path
    ) -> None:
        public = public_unet(SMALL)
        public.save_pretrained(tmp_path / "unet", max_shard_size="1MB")
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
        expected = UNet(SMALL)
        expected.load_state_dict(from_public(SMALL, public.state_dict()))
        assert_same(load_unet(tmp_path), expected)  # the pipeline's folder
        assert_same(load_unet(tmp_path / "unet"), expected)

    def test_half_precision_variant_is_read_into_float32(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet.half(), tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").rename(
            tmp_path / "diffusion_pytorch_model.fp16.safetensors"
        )
        assert_same(load_unet(tmp_path), unet.float())
        assert {tensor.dtype for _, tensor in read_weights(tmp_path)[1]} == {torch.float16}

    def test_original_file_needs_no_config_and_may_hold_more(self, tmp_path: Path) -> None:
        unet = UNet(PUBLIC_HEADS)
        save_unet(unet, tmp_path / "saved.safetensors", "original")
        tensors = load_file(tmp_path / "saved.safetensors")
        tensors["first_stage_model.encoder.conv_in.weight"] = torch.zeros(3)
        save_file(tensors, tmp_path / "public.safetensors")  # without our metadata
        assert_same(load_unet(tmp_path / "public.safetensors"), unet)

    def test_network_without_scalars_has_the_original_layout_only(self, tmp_path: Path) -> None:
        unet = UNet(replace(SMALL, in_channels=4, num_scalars=0))
        save_unet(unet, tmp_path / "t2v.safetensors", "original")
        assert_same(load_unet(tmp_path / "t2v.safetensors"), unet)
        with pytest.raises(ValueError, match=r"num_scalars is 0, .* in the original layout"):
            save_unet(unet, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_layouts_and_names_of_files(self, unet: UNet, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="layout is 'onnx': it must be one of diffusers, original"):
            save_unet(unet, tmp_path, "onnx")
        with pytest.raises(ValueError, match=r"is svd.ckpt: .* must end in .safetensors"):
            save_unet(unet, tmp_path / "svd.ckpt", "original")


class TestImageModel:
    """Weights of Stable Diffusion 2.1 are a part of the network's; the others are new."""

    @pytest.fixture
    def image_model(self, image_unet: Any) -> nn.Module:
        return image_unet(replace(PUBLIC_HEADS, in_channels=4))

    @pytest.fixture(params=["diffusers", "original"])
    def path(self, request: pytest.FixtureRequest, image_model: Any, tmp_path: Path) -> Path:
        if request.param == "diffusers":
            image_model.save_pretrained(tmp_path / "unet")
            return tmp_path
        return self.save_original(image_model, tmp_path / "v2-1_512.safetensors")

    def save_original(self, image_model: nn.Module, path: Path) -> Path:
        config = replace(PUBLIC_HEADS, in_channels=4, num_scalars=0)
        theirs, original = (public_modules(config, layout) for layout in ("diffusers", "original"))
        tensors, state = {}, image_model.state_dict()
        with torch.device("meta"):
            names = [name for name, _ in UNet(config).named_parameters()]
        for name in names:
            for old, new in zip(public_names(name, theirs), public_names(name, original), strict=True):
                if (old := old.replace("spatial_res_block.", "")) in state:
                    tensors[new] = state.pop(old)
        assert not state
        save_file(tensors, path)
        return path

    def test_image_model_is_read_into_the_spatial_layers(
        self, path: Path, image_model: nn.Module, caplog: pytest.LogCaptureFixture
    ) -> None:
        unet = load_unet(path)
        assert unet.config == replace(PUBLIC_HEADS, in_channels=4, num_scalars=0)
        tags = parameter_tags(unet)
        found = [name for name, _ in read_weights(path)[1]]
        assert set(found) == {name for name, tag in tags.items() if tag != "temporal"}
        spatial = sum(p.numel() for name, p in unet.named_parameters() if tags[name] != "temporal")
        assert spatial == sum(p.numel() for p in image_model.parameters())
        assert "are not in" in caplog.text
        assert all(p.isfinite().all() for p in unet.parameters())
        assert unet.encoder[0].residual.alpha.mix_factor.item() == 0.5

    def test_added_inputs_are_zero(self, path: Path, image_model: nn.Module) -> None:
        config, tensors = read_weights(path, config=PUBLIC_HEADS)
        weight = dict(tensors)["conv_in.weight"]
        assert config == PUBLIC_HEADS
        assert torch.equal(to_public("conv_in.weight", weight)[:, :4], image_model.conv_in.weight)
        assert weight.shape[-1] == 8 and not weight[..., 4:].any()

    def test_one_frame_of_the_new_network_is_the_image_model(
        self, path: Path, image_model: nn.Module
    ) -> None:
        unet = load_unet(path, config=replace(PUBLIC_HEADS, num_scalars=0))
        x, c_noise, context = torch.randn(1, 2, 4, 4, 4), torch.randn(1), torch.randn(1, 3, 48)
        wide = torch.cat([x, torch.randn_like(x)], dim=2)
        found = unet(wide, c_noise, context, torch.zeros(1, 0), torch.ones(1, 2, dtype=torch.bool))
        expected = image_model(x[0], c_noise.expand(2), context.expand(2, -1, -1)).sample
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)  # another eps; docs/numerics.md


@pytest.mark.parametrize("write", ["weights", "adapters"])
def test_full_disk_leaves_no_partial_file(
    unet: UNet, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path = tmp_path / "x.safetensors"
    path.write_text("previous content")
    monkeypatch.setattr(fsync_io, "save_file", fill)
    if write == "adapters":
        add_lora(unet, LoraConfig(rank=2))
    with pytest.raises(OSError, match=r"x\.safetensors.* cannot be written: .*No space left"):
        save_lora(unet, path) if write == "adapters" else save_unet(unet, path, "original")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "previous content"


PEAKS = """
import os, runpy, sys, threading
from svd_ds.weights.io import load_unet

tool = runpy.run_path("tools/convert.py")

def private_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def load(path):
    return sum(4 * parameter.numel() for parameter in load_unet(path).parameters())

def convert(path):
    sys.argv = ["convert.py", path, f"{path}-converted.safetensors", "--layout", "original"]
    tool["main"]()
    return os.path.getsize(sys.argv[2])

def measure(work, path):
    before, peaks, done = private_kb(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peaks.append(private_kb())
    watcher = threading.Thread(target=watch)
    watcher.start()
    weights = work(path)
    done.set()
    watcher.join()
    share = 1024 * (max(peaks) - before) / weights
    print("peak", work.__name__, os.path.basename(path), share, file=sys.stderr)

for path in sys.argv[1:]:
    for work in (load, convert)[: 1 if "image" in path else 2]:
        # One process each: freed memory is not returned to the system.
        if os.fork() == 0:
            measure(work, path)
            os._exit(0)
        os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports private memory apart")
def test_reading_and_converting_take_little_more_memory_than_the_weights(
    image_unet: Any, tmp_path: Path
) -> None:
    unet = UNet(UNetConfig(widths=(64, 128, 256, 256), num_layers=1, context_width=64))
    save_unet(unet, tmp_path / "folder")
    save_unet(unet, tmp_path / "file.safetensors", "original")
    save_checkpoint(tmp_path / "raw", unet, 2)
    save_checkpoint(tmp_path / "average", unet, 2)
    save_checkpoint(tmp_path / "average", unet, 3, "power-0.050")
    image_unet(replace(unet.config, in_channels=4)).save_pretrained(tmp_path / "image")
    save_unet(unet.half(), tmp_path / "half")
    forms = ("folder", "file.safetensors", "raw", "average", "image", "half")
    command = [sys.executable, "-c", PEAKS, *(str(tmp_path / form) for form in forms)]
    errors = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr
    shares = {name: float(share) for name, share in re.findall(r"^peak (.+) (.+)$", errors, re.MULTILINE)}
    assert len(shares) == 2 * len(forms) - 1
    assert all(share < 1.3 for share in shares.values()), shares
    assert all(share > 0.9 for form, share in shares.items() if form.startswith("load")), shares


def test_package_offers_loading_without_importing_torch() -> None:
    code = "import sys, svd_ds; light = 'torch' not in sys.modules; svd_ds.load_unet; assert light"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = svd_ds.nonsense  # type: ignore[attr-defined]
