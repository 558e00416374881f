"""Temporal layers see one pixel's frames at a time, in any number."""

from __future__ import annotations

import pytest
import torch

from svd_ds.model.temporal import (
    FramePositions,
    TemporalAttention,
    TemporalResidual,
    TemporalTransformerBlock,
)

B, T, H, W, C = 2, 5, 2, 3, 64


def test_residual_starts_at_zero_and_sees_the_clip_through_its_norms() -> None:
    block = TemporalResidual(C, 16, eps=1e-5)
    x, embedding = torch.randn(B, T, H, W, C), torch.randn(B, 16)
    assert not block(x, embedding).any()
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    out = block(x, embedding)
    assert out.shape == x.shape and out.is_contiguous()
    torch.testing.assert_close(out[1:], block(x[1:], embedding[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_clips", [1, 2])
def test_attention_mixes_the_frames_of_a_pixel_only(num_clips: int) -> None:
    block = TemporalAttention(C, 32, "sdpa")
    x = torch.randn(num_clips, T, H, W, C, requires_grad=True)
    out = block(x)
    assert out.is_contiguous()
    out[-1, 1, 0, 2].sum().backward()
    reached = x.grad.abs().sum(-1) > 0
    assert reached[-1, :, 0, 2].all()
    reached[-1, :, 0, 2] = False
    assert not reached.any()


def test_attention_equals_the_formula() -> None:
    x = torch.randn(B, T, H, W, C)
    block = TemporalAttention(C, 32, "sdpa")
    out = block(x)
    block.backend = "reference"
    torch.testing.assert_close(out, block(x), rtol=1e-4, atol=1e-5)


def test_positions_are_absolute() -> None:
    positions = FramePositions(C)
    longer = positions(25, torch.device("cpu"))
    assert longer.shape == (25, 1, 1, C)
    torch.testing.assert_close(longer[:14], positions(14, torch.device("cpu")))
    assert not torch.allclose(longer[0], longer[1])


def test_transformer_block_keeps_the_layout() -> None:
    block = TemporalTransformerBlock(C, 48, 32, "sdpa")
    for num_tokens in (1, 7):
        assert block(torch.randn(B, T, H, W, C), torch.randn(B, num_tokens, 48)).is_contiguous()
