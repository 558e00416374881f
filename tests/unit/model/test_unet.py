"""The UNet equals diffusers' UNetSpatioTemporalConditionModel in values and gradients, and has its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.weights.public_names import from_public, public_modules, public_names

DATA = Path(__file__).parents[1] / "weights" / "data"
FULL = UNetConfig()
SMALL = UNetConfig(
    widths=(64, 128),
    attention_levels=(True, False),
    num_layers=1,
    head_width=32,
    context_width=48,
    scalar_width=32,
)


def draw_inputs(
    config: UNetConfig, clips: int, frames: int, tokens: int, height: int, width: int
) -> dict[str, Tensor]:
    scalars = torch.tensor([6.0, 127.0, 0.02]) + torch.arange(clips)[:, None]
    return {
        "x": torch.randn(clips, frames, config.in_channels, height, width),
        "c_noise": torch.randn(clips),
        "context": torch.randn(clips, tokens, config.context_width),
        "scalars": scalars[:, : config.num_scalars],
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def run(network: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and, of a random projection of it, the gradients by x and context."""
    x, context = (inputs[name].to(dtype, copy=True).requires_grad_() for name in ("x", "context"))
    out = network(x, inputs["c_noise"], context, inputs["scalars"])
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [out.detach(), x.grad, context.grad]


class TestAgainstDiffusers:
    @pytest.fixture
    def pair_of(self, public_unet: Any, from_public: Any) -> Callable[[UNetConfig], tuple[UNet, nn.Module]]:
        def build(config: UNetConfig) -> tuple[UNet, nn.Module]:
            ours, theirs = UNet(config), public_unet(config)
            ours.load_state_dict(from_public(config, theirs.state_dict()))
            return ours, theirs

        return build

    @pytest.fixture
    def compare(
        self, from_public: Any
    ) -> Callable[..., tuple[list[float], dict[str, tuple[Tensor, Tensor]]]]:
        """Relative errors of output and input gradients; each parameter's gradient, ours and theirs."""

        def run_both(ours: UNet, theirs: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> Any:
            found = run(ours.to(dtype), inputs, dtype)
            theirs = theirs.to(dtype)
            expected = run(lambda *args: theirs(*args, return_dict=False)[0], inputs, dtype)
            public = from_public(ours.config, {name: p.grad for name, p in theirs.named_parameters()})
            # With one context token no gradient reaches the queries here; in diffusers, rounding errors do.
            grads = {
                name: (torch.zeros_like(p) if p.grad is None else p.grad, public[name])
                for name, p in ours.named_parameters()
            }
            return list(map(relative, found, expected)), grads

        return run_both

    @pytest.mark.parametrize(
        ("clips", "frames", "tokens", "height", "width"),
        [(1, 1, 1, 8, 16), (3, 5, 77, 24, 8), (1, 14, 77, 8, 8), (1, 25, 1, 8, 8), (3, 2, 1, 40, 24)],
    )
    def test_values_and_gradients_equal_diffusers_in_single_precision(
        self, clips: int, frames: int, tokens: int, height: int, width: int, pair_of: Any, compare: Any
    ) -> None:
        config = replace(FULL, widths=(32, 64, 64, 64), head_width=32, context_width=48, scalar_width=32)
        inputs = draw_inputs(config, clips, frames, tokens, height, width)
        errors, grads = compare(*pair_of(config), inputs, torch.float32)
        assert max(errors) < 1e-5
        found, expected = (torch.cat([pair[side].flatten() for pair in grads.values()]) for side in (0, 1))
        assert relative(found, expected) < 1e-5

    @pytest.mark.parametrize("clips", [1, 3])
    @pytest.mark.parametrize("tokens", [1, 77])
    @pytest.mark.parametrize("depth", [1, 2])
    def test_every_gradient_equals_diffusers_in_double_precision(
        self, clips: int, tokens: int, depth: int, pair_of: Any, compare: Any
    ) -> None:
        """Single precision is too coarse for a mix factor's gradient, a small sum of large terms."""
        config = replace(
            SMALL, widths=(32, 64), attention_levels=(True, False), num_layers=1, transformer_depth=depth
        )
        inputs = draw_inputs(config, clips, 5, tokens, 4, 6)
        errors, grads = compare(*pair_of(config), inputs, torch.float64)
        assert max(errors) < 1e-11
        scale = max(expected.norm() for _, expected in grads.values())
        for name, (found, expected) in grads.items():
            assert (found - expected).norm() < 1e-10 * expected.norm() + 1e-13 * scale, name

    def test_images_among_video_frames_equal_diffusers(self, pair_of: Any) -> None:
        """diffusers' UNet takes no image_only, but its blocks do."""
        ours, theirs = pair_of(SMALL)
        clips, frames, width = 2, 3, SMALL.widths[0]
        x = torch.randn(clips, frames, 8, 8, width)
        embedding, context = torch.randn(clips, 4 * width), torch.randn(clips, 7, SMALL.context_width)
        image_only = torch.tensor([[True, False, False], [True, True, True]])
        x_NCHW = x.flatten(0, 1).permute(0, 3, 1, 2)
        per_frame = context.repeat_interleave(frames, 0)
        layer, public = ours.encoder[0], theirs.down_blocks[0]

        found = layer.residual(x, nn.functional.silu(embedding), image_only)
        expected = public.resnets[0](x_NCHW, embedding.repeat_interleave(frames, 0), image_only)
        assert relative(found.flatten(0, 1).permute(0, 3, 1, 2), expected) < 1e-5

        found = layer.transformer(x, context, image_only)
        expected = public.attentions[0](x_NCHW, per_frame, image_only, return_dict=False)[0]
        assert relative(found.flatten(0, 1).permute(0, 3, 1, 2), expected) < 1e-5


def test_blocks_are_the_16_transformers_and_22_residual_blocks() -> None:
    kinds = Counter(type(block).__name__ for block in meta(FULL).blocks().values())
    assert kinds == {"Transformer": 16, "Residual": 22}


class TestImages:
    def test_image_only_equals_the_image_model(self, image_unet: Any, randomize: Any) -> None:
        """Temporal layers have no effect with image_only: the output equals the image UNet."""
        config = replace(SMALL, in_channels=4, num_scalars=0)
        theirs = image_unet(config)
        for name, module in theirs.named_modules():
            # The video class norms these with another eps; see docs/numerics.md.
            if (
                isinstance(module, nn.GroupNorm)
                and "resnets" in name
                and not name.startswith(("mid", "down_blocks.1"))
            ):
                module.eps = 1e-6
        ours = randomize(UNet(config))
        modules = public_modules(config, "diffusers")
        weights = {
            name.replace(".spatial_res_block", ""): tensor for name, tensor in theirs.state_dict().items()
        }
        for name, parameter in ours.named_parameters():
            names = [public.replace("spatial_res_block.", "") for public in public_names(name, modules)]
            if names[0] in weights:
                parameter.data = from_public(name, torch.cat([weights.pop(public) for public in names]))
        assert not weights

        inputs = draw_inputs(config, 2, 3, 7, 8, 16)
        found = ours(*inputs.values(), image_only=torch.ones(2, 3, dtype=torch.bool))
        expected = theirs(
            inputs["x"].flatten(0, 1),
            inputs["c_noise"].repeat_interleave(3),
            inputs["context"].repeat_interleave(3, 0),
            return_dict=False,
        )[0]
        assert relative(found.flatten(0, 1), expected) < 1e-5

    def test_video_differs_from_the_image_model(self, randomize: Any) -> None:
        ours, inputs = randomize(UNet(SMALL)), draw_inputs(SMALL, 1, 3, 1, 8, 8)
        images = ours(*inputs.values(), image_only=torch.ones(1, 3, dtype=torch.bool))
        assert relative(ours(*inputs.values()), images) > 1e-2


class TestMask:
    """Input channels: four noisy, four of the given frames, one mask."""

    CONFIG = replace(SMALL, in_channels=9, masked=True)

    @pytest.fixture
    def unet(self, randomize: Any) -> UNet:
        return randomize(UNet(self.CONFIG))

    def inputs(self, mask: list[float], height: int = 8, width: int = 8) -> dict[str, Tensor]:
        inputs = draw_inputs(self.CONFIG, 2, len(mask), 2, height, width)
        inputs["x"][:, :, 8] = torch.tensor(mask).view(-1, 1, 1)
        return inputs

    @pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 6)])
    def test_embedding_replaces_latents_of_other_frames(self, height: int, width: int, unet: UNet) -> None:
        inputs = self.inputs([1, 0, 0, 1], height, width)
        found = unet(*inputs.values())
        changed = {name: value.clone() for name, value in inputs.items()}
        changed["x"][:, 1:3, 4:8] = 100.0
        assert torch.equal(unet(*changed.values()), found), "latents under the mask have no effect"
        changed["x"][:, 3, 4:8] += 1.0
        assert not torch.equal(unet(*changed.values()), found), "given latents have an effect"

        plain = UNet(replace(self.CONFIG, masked=False))
        plain.load_state_dict(
            {name: value for name, value in unet.state_dict().items() if "mask" not in name}
        )
        inputs["x"][:, 1:3, 4:8] = unet.mask_embedding.weight.detach().view(4, 1, 1)
        assert torch.equal(plain(*inputs.values()), found)

    def test_embedding_gets_gradients_from_frames_that_are_not_given(self, unet: UNet) -> None:
        unet(*self.inputs([1, 0, 1]).values()).square().sum().backward()
        assert unet.mask_embedding.weight.grad.all()
        unet.zero_grad()
        unet(*self.inputs([1, 1, 1]).values()).square().sum().backward()
        assert not unet.mask_embedding.weight.grad.any()

    def test_starts_at_zero_and_is_tagged_as_a_condition(self) -> None:
        assert not UNet(self.CONFIG).mask_embedding.weight.any()
        assert parameter_tags(meta(self.CONFIG))["mask_embedding.weight"] == "condition"


class TestForward:
    def test_starts_at_zero_with_neutral_blocks(self) -> None:
        unet = UNet(SMALL)
        assert not unet(*draw_inputs(SMALL, 1, 2, 1, 8, 8).values()).any()
        x = torch.randn(1, 2, 8, 8, 64)
        assert torch.equal(unet.encoder[0].residual(x, torch.randn(1, 256)), x)
        assert torch.equal(unet.encoder[0].transformer(x, torch.randn(1, 1, 48)), x)

    def test_dropped_scalar_has_no_embedding(self, randomize: Any) -> None:
        unet = randomize(UNet(SMALL))
        width = SMALL.scalar_width
        inputs = draw_inputs(SMALL, 2, 2, 1, 8, 8)
        full = unet(*inputs.values())
        inputs["scalars"][0, 1] = torch.nan
        dropped = unet(*inputs.values())
        assert torch.equal(dropped[1], full[1]) and not torch.equal(dropped[0], full[0])
        with torch.no_grad():
            unet.embedding.scalars.linear1.weight[:, width : 2 * width] = 0
        inputs["scalars"][0, 1] = 30.0
        torch.testing.assert_close(unet(*inputs.values())[0], dropped[0])

    def test_output_is_contiguous_in_the_dtype_of_the_weights(self) -> None:
        out = UNet(SMALL).bfloat16()(*draw_inputs(SMALL, 1, 2, 1, 8, 8).values())
        assert out.dtype == torch.bfloat16 and out.is_contiguous() and out.shape == (1, 2, 4, 8, 8)

    def test_blocks_can_be_recomputed(self, randomize: Any) -> None:
        unet, inputs = randomize(UNet(SMALL)), draw_inputs(SMALL, 1, 2, 1, 8, 8)
        expected = run(unet, inputs, torch.float32)
        for block in unet.blocks().values():
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        assert all(map(torch.equal, run(unet, inputs, torch.float32), expected))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x": (2, 3, 4, 8, 8)}, r"\(B, T, 8, h, w\), not \(2, 3, 4, 8, 8\)"),
            ({"x": (2, 3, 8, 9, 8)}, r"height 9 \(72 pixels\) is not a multiple of 2 \(16 pixels\)"),
            ({"x": (2, 3, 8, 8, 11)}, r"width 11 \(88 pixels\) is not a multiple of 2 \(16 pixels\)"),
            ({"c_noise": (3,)}, r"c_noise must have the shape \(2\), not \(3,\)"),
            ({"context": (2, 1, 40)}, r"context must have the shape \(2, tokens, 48\), not \(2, 1, 40\)"),
            ({"context": (2, 48)}, r"context must have the shape \(2, tokens, 48\), not \(2, 48\)"),
            ({"scalars": (2, 2)}, r"scalars must have the shape \(2, 3\), not \(2, 2\)"),
            ({"image_only": (2, 4)}, r"image_only must have the shape \(2, 3\), not \(2, 4\)"),
        ],
    )
    def test_inputs_of_wrong_shapes_are_refused(self, change: dict[str, tuple[int, ...]], words: str) -> None:
        inputs: dict[str, Tensor | None] = {**draw_inputs(SMALL, 2, 3, 1, 8, 8), "image_only": None}
        inputs |= {name: torch.zeros(shape) for name, shape in change.items()}
        with pytest.raises(ValueError, match=words):
            meta(SMALL)(*inputs.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": (64, 128)}, "widths has 2 levels and model.attention_levels 4"),
        ({"widths": (64, 100, 128, 128)}, "model.widths has 100: .* multiple of 32 .* 64"),
        ({"num_layers": 0}, "model.num_layers is 0: it must be at least 1"),
        ({"num_scalars": -1}, "model.num_scalars is -1: it must be at least 0"),
        ({"masked": True, "in_channels": 5}, "in_channels is 5: with model.masked it must be at least 6"),
        ({"scalar_width": 5}, "model.scalar_width is 5: it must be even"),
        ({"temporal_attention": "xformers"}, "temporal_attention is 'xformers': it must be one of auto"),
        ({"kernels": "cuda"}, "kernels is 'cuda': it must be one of auto, triton, torch"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(FULL, **changes)


def test_each_parameter_has_the_tag_of_its_innermost_module() -> None:
    tags = parameter_tags(meta(SMALL))
    assert tags["conv_in.weight"] == tags["encoder.0.transformer.proj_in.weight"] == "spatial"
    assert tags["encoder.0.residual.spatial.time_projection.weight"] == "spatial"
    assert tags["encoder.0.residual.temporal.time_projection.weight"] == "temporal"
    assert tags["encoder.0.transformer.alpha.mix_factor"] == "temporal"
    assert tags["encoder.0.transformer.positions.mlp.linear1.weight"] == "temporal"
    assert tags["embedding.time.linear2.bias"] == "embedding", "the image model's own"
    assert tags["embedding.scalars.linear2.bias"] == "condition"
