"""A run's shards are joined to weights; files of another network are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.weights.io import load_unet, save_unet
from svd_ds.weights.manifest import COMPLETE
from tests.networks import SMALL, assert_same, save_checkpoint, seal


class TestRuns:
    @pytest.mark.parametrize("ranks", [1, 3])
    def test_checkpoints_shards_are_joined(self, ranks: int, unet: UNet, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, unet, ranks)
        assert_same(load_unet(tmp_path), unet)

    def test_temporal_layers_without_a_public_layout(self, randomize: Any, tmp_path: Path) -> None:
        unet = randomize(UNet(replace(SMALL, temporal="make_a_video")))
        save_checkpoint(tmp_path, unet, 2)
        assert_same(load_unet(tmp_path), unet)

    def test_weights_of_a_run_are_its_newest_complete_checkpoint(self, unet: UNet, tmp_path: Path) -> None:
        for step in (90, 100, 110):
            nn.init.constant_(unet.conv_in.bias, step)
            save_checkpoint(tmp_path / f"checkpoints/step-{step:07d}", unet, 2)
        (tmp_path / "checkpoints/step-0000110" / COMPLETE).unlink()
        assert load_unet(tmp_path).conv_in.bias[0] == 100
        with pytest.raises(ValueError, match=r"step-0000110 is not complete: it has no file COMPLETE"):
            load_unet(tmp_path / "checkpoints/step-0000110")

    def test_averages_are_chosen_by_name(self, unet: UNet, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, unet, 2)
        raw = unet.conv_in.bias[0].item()
        for average, value in (("power-0.050", 5.0), ("power-0.100", 10.0)):
            nn.init.constant_(unet.conv_in.bias, value)
            save_checkpoint(tmp_path, unet, 2, average)
        found = {
            which: load_unet(tmp_path, which).conv_in.bias[0].item() for which in (None, "raw", "power-0.100")
        }
        assert found == {None: 5.0, "raw": raw, "power-0.100": 10.0}
        with pytest.raises(
            ValueError, match=r"no weights '0.9999': .* one of raw, power-0.050, power-0.100, or a length"
        ):
            load_unet(tmp_path, "0.9999")

    def test_average_takes_frozen_parameters_from_the_weights(self, unet: UNet, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, unet, 2)
        nn.init.constant_(unet.conv_in.bias, 5.0)
        save_checkpoint(tmp_path, unet, 2, "power-0.050")
        files = sorted((tmp_path / "ema-power-0.050").iterdir())
        assert len(files) == 2
        for file in files:
            save_file({"conv_in.bias": load_file(file)["conv_in.bias"]}, file)
        seal(tmp_path)
        assert_same(load_unet(tmp_path), unet)
        assert load_unet(tmp_path, "raw").conv_in.bias[0] != 5.0

    def test_missing_file_of_a_rank_is_an_error(self, unet: UNet, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, unet, 3)
        (tmp_path / "unet/rank-00001-of-00003.safetensors").unlink()
        with pytest.raises(ValueError, match=r"damaged: unet/rank-00001-of-00003.safetensors is missing"):
            load_unet(tmp_path)

    def test_run_without_checkpoints_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(ValueError, match="no complete checkpoint yet"):
            load_unet(tmp_path)


class TestHandOver:
    """A stage starts from the previous one: existing weights are loaded, added ones are zero or initial
    values."""

    @pytest.fixture(params=["diffusers", "checkpoint"])
    def stage(self, request: pytest.FixtureRequest, unet: UNet, tmp_path: Path) -> Path:
        if request.param == "diffusers":
            save_unet(unet, tmp_path)
        else:
            save_checkpoint(tmp_path, unet, 3)
        return tmp_path

    def test_inputs_and_scalars_are_added(self, unet: UNet, stage: Path) -> None:
        wider = load_unet(stage, config=replace(SMALL, in_channels=9, num_scalars=4))
        for (name, after), before in zip(wider.named_parameters(), unet.parameters(), strict=True):
            inputs = before.shape[-1]
            assert torch.equal(after[..., :inputs], before), name
            assert not after[..., inputs:].any(), name
        assert wider.conv_in.weight.shape[-1] == 9
        assert wider.embedding.scalars.linear1.weight.shape[-1] == 4 * 32

    def test_video_model_starts_from_an_image_stage(self, randomize: Any, tmp_path: Path) -> None:
        image = randomize(UNet(replace(SMALL, in_channels=4, num_scalars=0, temporal="none")))
        save_checkpoint(tmp_path, image, 2)
        video = load_unet(tmp_path, config=replace(SMALL, in_channels=4, num_scalars=2))
        tags, found = parameter_tags(video), dict(video.named_parameters())
        assert {tags[name] for name, _ in image.named_parameters()} == {"spatial", "embedding"}
        for name, parameter in image.named_parameters():
            assert torch.equal(found.pop(name), parameter), name
        assert {tags[name] for name in found} == {"temporal", "condition"}
        assert found["middle.0.residual.alpha.mix_factor"] == 0.5


class TestWrongFiles:
    """Each error names the file, the tensor and both shapes, as far as there are any."""

    def change(self, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
        save_unet(UNet(SMALL), folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return folder

    def test_tensor_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        path = self.change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(64, 96)}))
        with pytest.raises(
            ValueError, match=rf"{path}.*{name} has the shape \(64, 96\), .* takes \(64, 64\)"
        ):
            load_unet(path)

    def test_missing_tensor_is_refused(self, tmp_path: Path) -> None:
        path = self.change(tmp_path, lambda tensors: tensors.pop("conv_in.bias"))
        with pytest.raises(ValueError, match=rf"{path}.* lacks conv_in.bias, of shape \(32,\)"):
            load_unet(path)

    def test_missing_temporal_tensor_is_refused(self, tmp_path: Path) -> None:
        name = "mid_block.resnets.0.time_mixer.mix_factor"
        path = self.change(tmp_path, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=r"lacks middle.0.residual.alpha.mix_factor"):
            load_unet(path)

    def test_unknown_tensor_is_refused(self, tmp_path: Path) -> None:
        path = self.change(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(1)))
        with pytest.raises(ValueError, match=rf"{path}.* holds extra, which the network does not have"):
            load_unet(path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"in_channels": 4},
                "model.in_channels is 4, and the weights at .* have 8: it must be at least 8",
            ),
            ({"num_scalars": 0}, "model.num_scalars is 0, .* have 3: it must be at least 3"),
            ({"context_width": 64}, "model.context_width is 64, .* have 48: it must be the same"),
            ({"widths": (64, 64)}, r"model.widths is \(64, 64\), .* have \(32, 64\): it must be the same"),
            ({"scalar_width": 64}, "model.scalar_width is 64, and the weights at .* have 32"),
            ({"temporal": "none"}, "model.temporal is none, .* have svd"),
        ],
        ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
    )
    @pytest.mark.parametrize("form", ["diffusers", "checkpoint"])
    def test_config_of_another_network_is_refused(
        self, unet: UNet, tmp_path: Path, form: str, changes: dict[str, Any], words: str
    ) -> None:
        if form == "diffusers":
            save_unet(unet, tmp_path)
        else:
            save_checkpoint(tmp_path, unet, 2)
        with pytest.raises(ValueError, match=words):
            load_unet(tmp_path, config=replace(SMALL, **changes))

    def test_paths_without_weights_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nothing at .*absent"):
            load_unet(tmp_path / "absent")
        with pytest.raises(ValueError, match="neither a diffusers folder, nor a run"):
            load_unet(tmp_path)
        (tmp_path / "x.safetensors").write_text("hello")
        with pytest.raises(ValueError, match=r"x.safetensors is not a safetensors file"):
            load_unet(tmp_path / "x.safetensors")
        save_file({"model.diffusion_model.a": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"holds no model.diffusion_model.input_blocks.0.0.weight"):
            load_unet(tmp_path / "x.safetensors")

    def test_average_of_public_weights_is_refused(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet, tmp_path)
        with pytest.raises(
            ValueError, match=r"not a run or a checkpoint, so it has no average 'power-0.050'"
        ):
            load_unet(tmp_path, "power-0.050")


class TestFilesOfOthers:
    """Public weights as other trainers and tools save them."""

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_sharded_diffusers_files_and_variants_are_read(
        self, public_unet: Any, variant: str | None, tmp_path: Path
    ) -> None:
        network = public_unet(SMALL)
        network.save_pretrained(tmp_path / "unet", variant=variant, max_shard_size="500KB")
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
        found = load_unet(tmp_path)
        assert torch.equal(found.conv_in.weight.permute(0, 3, 1, 2), network.conv_in.weight)

    def test_two_variants_are_ambiguous(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet, tmp_path)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        for variant in ("fp16", "non_ema"):
            (tmp_path / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(file.read_bytes())
        file.unlink()
        with pytest.raises(ValueError, match=r"needs one .*, and has .*fp16.safetensors, .*non_ema"):
            load_unet(tmp_path)

    def test_index_cannot_lead_out_of_its_folder(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet, tmp_path / "other")
        save_unet(unet, tmp_path / "unet")
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        outside = "../other/diffusion_pytorch_model.safetensors"
        for weight_map in ({"conv_in.weight": outside}, {"conv_in.weight": "absent.safetensors"}):
            index.write_text(json.dumps({"weight_map": weight_map}))
            with pytest.raises(ValueError, match=r"index.json lists .*, which is not a file in"):
                load_unet(tmp_path)
        index.write_text("[]")
        with pytest.raises(ValueError, match="has no weight_map"):
            load_unet(tmp_path)

    @pytest.mark.parametrize("prefix", ["", "diffusion_model.", "_orig_mod.", "module.model."])
    @pytest.mark.parametrize("layout", ["original", "diffusers"])
    def test_any_prefix_of_a_wrapper_is_read(
        self, unet: UNet, layout: str, prefix: str, tmp_path: Path
    ) -> None:
        path = tmp_path / ("x.safetensors" if layout == "original" else "x")
        save_unet(unet, path, layout)
        file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        renamed = {prefix + name.removeprefix("model.diffusion_model."): t for name, t in tensors.items()}
        save_file(renamed, file, metadata)
        assert torch.equal(load_unet(path).conv_out.weight, unet.conv_out.weight)

    def test_only_the_network_is_read_from_a_file_of_a_complete_pipeline(
        self, unet: UNet, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.safetensors"
        save_unet(unet, path, "original")
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        others = {"first_stage_model.a": torch.zeros(1), "conditioner.b": torch.zeros(1)}
        averages = {
            f"model_ema.{name.removeprefix('model.').replace('.', '')}": torch.zeros_like(tensor)
            for name, tensor in load_file(path).items()
        }
        save_file(load_file(path) | others | averages | {"model_ema.decay": torch.ones(())}, path, metadata)
        assert_same(load_unet(path), unet)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
            (b"PK\x03\x04" + bytes(60), "pickle of PyTorch"),
            (b"\x80\x02\x8a\nl\xfc", "pickle of PyTorch"),
            (b"<!DOCTYPE html><html></html>", "HTML page"),
        ],
    )
    def test_other_file_formats_are_named(self, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.safetensors is not a safetensors file: .*{words}"):
            load_unet(tmp_path / "x.safetensors")

    def test_folder_of_pickles_is_refused_by_format(self, unet: UNet, tmp_path: Path) -> None:
        save_unet(unet, tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin is a pickle, which is not read"):
            load_unet(tmp_path)
