"""Spatial layers see one frame at a time, and start as the public code does."""

from __future__ import annotations

import torch

from svd_ds.model.spatial import SpatialAttention, SpatialResidual, SpatialTransformerBlock

B, T, H, W, C = 2, 3, 4, 6, 64


def test_residual_processes_frames_independently_and_broadcasts_the_embedding() -> None:
    block = SpatialResidual(C, 2 * C, 16, eps=1e-5)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, embedding = torch.randn(B, T, H, W, C), torch.randn(B, 16)
    out = block(x, embedding)
    assert out.shape == (B, T, H, W, 2 * C) and out.is_contiguous()
    torch.testing.assert_close(out[1:, 2:], block(x[1:, 2:], embedding[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, block(x, embedding + 1))


def test_residual_starts_as_the_identity() -> None:
    block = SpatialResidual(C, C, 16, eps=1e-5)
    x = torch.randn(B, T, H, W, C)
    assert torch.equal(block(x, torch.randn(B, 16)), x)


def test_attention_mixes_the_pixels_of_a_frame_only() -> None:
    block = SpatialAttention(C, 32, "sdpa")
    x = torch.randn(B, T, H, W, C, requires_grad=True)
    block(x)[0, 1, 0, 0].sum().backward()
    reached = x.grad.abs().sum(-1) > 0
    assert reached[0, 1].all()
    reached[0, 1] = False
    assert not reached.any()


def test_attention_is_equivariant_to_permutations_of_pixels() -> None:
    block = SpatialAttention(C, 32, "sdpa")
    x = torch.randn(1, 1, 1, H * W, C)
    order = torch.randperm(H * W)
    torch.testing.assert_close(block(x[:, :, :, order]), block(x)[:, :, :, order], rtol=1e-4, atol=1e-5)


def test_transformer_block_keeps_the_layout() -> None:
    block = SpatialTransformerBlock(C, 48, 32, "sdpa")
    for num_tokens in (1, 7):
        assert block(torch.randn(B, T, H, W, C), torch.randn(B, num_tokens, 48)).is_contiguous()
