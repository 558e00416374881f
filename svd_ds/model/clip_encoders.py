"""The frozen CLIP encoders: a frame as one token, a caption as 77.

Shape legend: B clips, C channels, H x W pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from svd_ds.model.frozen import from_pretrained, load_frozen

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on, red, green, blue (openai/CLIP clip.py)."""


class ImageEncoder:
    """Frames -> one CLIP token each. The public SVD's is OpenCLIP ViT-H/14, width 1024."""

    def __init__(self, network: CLIPVisionModelWithProjection) -> None:
        self.network = network
        self.width = int(network.config.projection_dim)
        size = network.config.image_size
        assert isinstance(size, int), f"CLIP's image is no square: {size}"
        self.size = size

    @staticmethod
    def load(path: str | Path, device: torch.device | str, dtype: torch.dtype) -> ImageEncoder:
        """Read `image_encoder/` of a pipeline folder or hub id."""
        from transformers import CLIPVisionModelWithProjection  # takes seconds: not before it is needed

        return ImageEncoder(load_frozen(CLIPVisionModelWithProjection, path, "image_encoder", device, dtype))

    @torch.no_grad()
    def __call__(self, frames_BCHW: Tensor) -> Tensor:
        """Frames in [-1, 1], (B, 3, H, W) -> projected embeddings, float32, (B, 1, D)."""
        weight = self.network.visual_projection.weight
        pixels = clip_pixels(frames_BCHW.to(weight.device), self.size).to(weight.dtype)
        return self.network(pixels).image_embeds.float().unsqueeze(1)


class TextEncoder:
    """Captions -> CLIP's last hidden states, after the final norm.

    Stable Diffusion 2.1 reads the penultimate layer of OpenCLIP ViT-H. Its public text encoder was saved with
    23 of the 24 layers, so the last states of the file are the penultimate ones of the network.
    """

    def __init__(self, network: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.width = int(network.config.hidden_size)
        self.num_tokens = int(network.config.max_position_embeddings)

    @staticmethod
    def load(path: str | Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Read `text_encoder/` and `tokenizer/` of a pipeline folder or hub id."""
        from transformers import CLIPTextModel, CLIPTokenizer

        network = load_frozen(CLIPTextModel, path, "text_encoder", device, dtype)
        return TextEncoder(network, from_pretrained(CLIPTokenizer, path, "tokenizer"))

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B captions, each cut or padded to L = 77 tokens -> states, float32, (B, L, D)."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.num_tokens,
            return_tensors="pt",
        )
        return self.network(tokens.input_ids.to(self.network.device)).last_hidden_state.float()


def clip_pixels(frames_BCHW: Tensor, size: int) -> Tensor:
    """Frames in [-1, 1] -> what CLIP was trained on: a size x size square, less its mean, over its deviation.

    Nothing is cropped, so the aspect ratio is not kept. Resized as sgm's FrozenOpenCLIPImageEmbedder does
    (kornia's antialiased bicubic, corners aligned): public weights see the pixels they know.
    """
    pixels = resize_antialiased(frames_BCHW.float(), size)
    mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def resize_antialiased(images_BCHW: Tensor, size: int) -> Tensor:
    """Resize to size x size: a Gaussian blur as wide as the shrinking asks for, then bicubic sampling.

    The blur's deviation is (factor - 1) / 2 along each side; its window spans two deviations to either hand.
    torch's own antialiasing stretches the cubic kernel instead, which makes another picture.
    """
    for dim in (2, 3):
        deviation = max((images_BCHW.shape[dim] / size - 1) / 2, 0.001)
        images_BCHW = blur(images_BCHW, dim, deviation, window=int(max(4 * deviation, 3)) | 1)
    return F.interpolate(images_BCHW, size=(size, size), mode="bicubic", align_corners=True)


def blur(images_BCHW: Tensor, dim: int, deviation: float, window: int) -> Tensor:
    """Convolve with a Gaussian of `window` taps (odd) along dimension 2 or 3, reflected at the borders."""
    reach = window // 2
    taps = torch.arange(-reach, reach + 1, device=images_BCHW.device, dtype=images_BCHW.dtype)
    kernel = torch.softmax(-(taps**2) / (2 * deviation**2), dim=0)
    num_channels = images_BCHW.shape[1]
    if dim == 2:
        kernel, padding = kernel.view(1, 1, -1, 1), (0, 0, reach, reach)
    else:
        kernel, padding = kernel.view(1, 1, 1, -1), (reach, reach, 0, 0)
    padded = F.pad(images_BCHW, padding, mode="reflect")
    return F.conv2d(padded, kernel.expand(num_channels, -1, -1, -1), groups=num_channels)
