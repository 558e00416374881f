"""The shared layers: torch's own arithmetic on (B, T, H, W, C) memory, without copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svd_ds.model.layers import (
    AlphaBlender,
    CrossAttention,
    EmbeddingMLP,
    FeedForward,
    FrameConv,
    FrameGroupNorm,
    Linear,
    TemporalConv,
    VideoGroupNorm,
    ZeroFrameConv,
    ZeroLinear,
    ZeroTemporalConv,
    sinusoidal_embedding,
)
from svd_ds.model.ops.attention import attention

B, T, H, W, C = 2, 3, 4, 6, 64


@pytest.fixture
def x_BTHWC() -> Tensor:
    return torch.randn(B, T, H, W, C)


def channels_first(x_BTHWC: Tensor) -> Tensor:
    return x_BTHWC.permute(0, 4, 1, 2, 3).contiguous()


class Copies(TorchDispatchMode):
    """Counts the copies of tensors as large as the activations."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copying = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        if func.overloadpacket in copying and out.numel() >= self.size:
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("layer", [FrameConv(C, C), TemporalConv(C, C), Linear(C, C)])
def test_convolutions_do_not_copy_and_keep_the_layout(layer: nn.Module, x_BTHWC: Tensor) -> None:
    with Copies(x_BTHWC.numel()) as copies, torch.no_grad():
        y = layer(x_BTHWC)
        assert not copies.names
        x_BTHWC.clone()
    assert copies.names == ["aten.clone.default"], "a copy would be seen"
    assert y.is_contiguous()


@pytest.mark.parametrize("stride", [1, 2])
def test_frame_conv_convolves_each_frame(stride: int, x_BTHWC: Tensor) -> None:
    layer = FrameConv(C, 8, stride=stride)
    frame = F.conv2d(
        x_BTHWC[1, 2].permute(2, 0, 1), layer.weight.permute(0, 3, 1, 2), layer.bias, stride=stride, padding=1
    )
    torch.testing.assert_close(layer(x_BTHWC)[1, 2].permute(2, 0, 1), frame, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_temporal_conv_equals_the_3d_convolution(num_frames: int) -> None:
    x = torch.randn(B, num_frames, H, W, C)
    layer = TemporalConv(C, 8)
    expected = F.conv3d(
        channels_first(x), layer.weight.permute(0, 3, 1, 2)[..., None], layer.bias, padding=(1, 0, 0)
    )
    torch.testing.assert_close(channels_first(layer(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 511, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_equals_torch(rows: int, dtype: torch.dtype) -> None:
    layer, x = Linear(C, 8).to(dtype), torch.randn(rows, 2, C, dtype=dtype, requires_grad=True)
    inputs, grad = (x, layer.weight, layer.bias), torch.randn(rows, 2, 8, dtype=dtype)
    ours, theirs = layer(x), F.linear(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_norms_have_statistics_per_frame_and_per_clip(x_BTHWC: Tensor) -> None:
    frame, clip = FrameGroupNorm(C, 1e-6), VideoGroupNorm(C, 1e-6)
    x = channels_first(x_BTHWC)
    per_clip = F.silu(F.group_norm(x, 32, eps=1e-6))
    torch.testing.assert_close(channels_first(clip(x_BTHWC)), per_clip, rtol=1e-4, atol=1e-5)
    per_frame = torch.stack([F.silu(F.group_norm(x[:, :, t], 32, eps=1e-6)) for t in range(T)], dim=2)
    torch.testing.assert_close(channels_first(frame(x_BTHWC)), per_frame, rtol=1e-4, atol=1e-5)


def test_sinusoid_is_cosines_then_sines() -> None:
    values = torch.tensor([0.0, 1.0, -0.4])
    frequencies = 10_000 ** -(torch.arange(4) / 4)
    expected = torch.cat(
        [torch.cos(values[:, None] * frequencies), torch.sin(values[:, None] * frequencies)], 1
    )
    torch.testing.assert_close(sinusoidal_embedding(values, 8), expected)
    assert sinusoidal_embedding(values.view(1, 3), 8).shape == (1, 3, 8)


def test_alpha_is_one_on_images_and_learned_elsewhere() -> None:
    alpha = AlphaBlender()
    learned = torch.sigmoid(torch.tensor(0.5))
    assert alpha(None).item() == pytest.approx(learned.item())
    image_only = torch.tensor([[True, False]])
    torch.testing.assert_close(alpha(image_only).flatten(), torch.stack([torch.tensor(1.0), learned]))
    assert alpha(image_only).shape == (1, 2, 1, 1, 1)


@pytest.mark.parametrize("layer", [ZeroFrameConv(C, C), ZeroTemporalConv(C, C), ZeroLinear(C, C)])
def test_zero_layers_start_at_zero(layer: nn.Module) -> None:
    sums = {name: parameter.abs().sum().item() for name, parameter in layer.named_parameters()}
    assert sums == {"weight": 0.0, "bias": 0.0}


def test_embedding_mlp_takes_float32_into_half_precision_weights() -> None:
    assert EmbeddingMLP(4, 8, 4).bfloat16()(torch.randn(2, 4)).dtype == torch.bfloat16


def test_feed_forward_gates_the_first_half_by_the_gelu_of_the_second(x_BTHWC: Tensor) -> None:
    layer = FeedForward(C)
    hidden, gate = layer.proj_in(layer.norm(x_BTHWC)).split(4 * C, dim=-1)
    torch.testing.assert_close(layer(x_BTHWC), layer.proj_out(hidden * F.gelu(gate)))


class TestCrossAttention:
    layer = CrossAttention(C, 48, 32, "reference")

    def test_frames_and_pixels_share_the_clips_context(self, x_BTHWC: Tensor) -> None:
        context = torch.randn(B, 7, 48)
        out = self.layer(x_BTHWC, context)
        one = self.layer(x_BTHWC[1:, 2:, 3:4, 5:], context[1:])
        torch.testing.assert_close(out[1:, 2:, 3:4, 5:], one, rtol=1e-4, atol=1e-5)

    def test_attention_to_one_token_equals_the_value_path(self, x_BTHWC: Tensor) -> None:
        context = torch.randn(B, 1, 48)
        q = self.layer.q(self.layer.norm(x_BTHWC)).view(B, -1, 2, 32)
        k, v = self.layer.kv(context).view(B, 1, 2, 2, 32).unbind(2)
        written_out = self.layer.out(attention(q, k, v, "reference").flatten(-2)).view(x_BTHWC.shape)
        torch.testing.assert_close(self.layer(x_BTHWC, context).expand_as(x_BTHWC), written_out)

    def test_attention_to_one_token_computes_no_queries(self, x_BTHWC: Tensor) -> None:
        out = self.layer(x_BTHWC, torch.randn(B, 1, 48))
        grads = torch.autograd.grad(out.sum(), list(self.layer.parameters()), allow_unused=True)
        unused = [
            name for (name, _), g in zip(self.layer.named_parameters(), grads, strict=True) if g is None
        ]
        assert unused == ["norm.weight", "norm.bias", "q.weight"]
