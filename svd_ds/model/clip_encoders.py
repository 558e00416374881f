"""The frozen encoders of OpenAI-style CLIP models: a frame to one token, a caption to 77 tokens.

Shape legend: B clips, C channels, H x W pixels, L tokens, D width.
"""

from __future__ import annotations

import threading
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
"""Mean and deviation of red, green and blue in CLIP's training images (openai/CLIP clip.py)."""


class ImageEncoder:
    """CLIP image encoder, one token a frame. The public SVD has OpenCLIP ViT-H/14, width 1024 (arXiv
    2311.15127 D.4)."""

    def __init__(self, network: CLIPVisionModelWithProjection) -> None:
        self.network = network
        self.width = int(network.config.projection_dim)
        size = network.config.image_size
        assert isinstance(size, int), f"CLIP's image is not a square: {size}"
        self.size = size

    @staticmethod
    def load(path: str | Path, device: torch.device | str, dtype: torch.dtype) -> ImageEncoder:
        """Load the image_encoder/ of a pipeline folder or hub id.

        Raises:
            FileNotFoundError: the pipeline lacks it.
        """
        from transformers import CLIPVisionModelWithProjection  # takes seconds, so only when it is needed

        return ImageEncoder(load_frozen(CLIPVisionModelWithProjection, path, "image_encoder", device, dtype))

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Encode frames in [-1, 1], (B, 3, H, W), to projected embeddings, float32, (B, 1, D)."""
        weight = self.network.visual_projection.weight
        pixels_BCHW = preprocess_frames(frames.to(weight.device), self.size).to(weight.dtype)
        return self.network(pixels_BCHW).image_embeds.float().unsqueeze(1)


class TextEncoder:
    """CLIP text encoder: the last hidden states, after the final norm.

    Stable Diffusion 2.1 takes the penultimate layer of OpenCLIP ViT-H. Its public text encoder was saved with
    23 of the 24 layers, so the last layer of the file is the penultimate layer of the network.
    """

    def __init__(self, network: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.width = int(network.config.hidden_size)
        self.num_tokens = int(network.config.max_position_embeddings)
        self._lock = threading.Lock()

    @staticmethod
    def load(path: str | Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Load the text_encoder/ and tokenizer/ of a pipeline folder or hub id.

        Raises:
            FileNotFoundError: the pipeline lacks one of them.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        network = load_frozen(CLIPTextModel, path, "text_encoder", device, dtype)
        return TextEncoder(network, from_pretrained(CLIPTokenizer, path, "tokenizer"))

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], tokens: Tensor | None = None) -> Tensor:
        """Encode B captions to embeddings, float32, (B, L, D).

        Args:
            tokens: result of `tokenize`, on the network's device; None computes it.
        """
        ids_BL = (self.tokenize(captions) if tokens is None else tokens).to(self.network.device)
        return self.network(ids_BL).last_hidden_state.float()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the token ids of captions, each cut or padded to L = 77 tokens: int64, (B, L), in host
        memory. Any thread may call it."""
        # tokenizers' objects refuse a second thread while a call sets their padding.
        with self._lock:
            tokens = self.tokenizer(
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=self.num_tokens,
                return_tensors="pt",
            )
        return tokens.input_ids


def preprocess_frames(frames: Tensor, size: int) -> Tensor:
    """Resize and normalise frames for a CLIP image encoder.

    Nothing is cropped, so the aspect ratio is not kept. Frames are resized as by sgm's
    FrozenOpenCLIPImageEmbedder (kornia's antialiased bicubic, corners aligned), for the public weights.

    Args:
        frames: in [-1, 1], (B, 3, H, W).
        size: side of the encoder's images.

    Returns:
        (B, 3, size, size), with CLIP's mean subtracted and divided by its deviation.
    """
    pixels_BCHW = resize_antialiased(frames.float(), size)
    # Filled on the device: a tensor made of a list would be copied from host memory, and waited for.
    mean, std = (
        torch.stack([pixels_BCHW.new_full((1, 1), value) for value in colours])
        for colours in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return ((pixels_BCHW + 1) / 2 - mean) / std


def resize_antialiased(images: Tensor, size: int) -> Tensor:
    """Resize images, (B, C, H, W), to size x size: a Gaussian blur, then bicubic sampling.

    The deviation of the blur is (factor - 1) / 2 along each side, its window two deviations to either side.
    torch's own antialiasing stretches the cubic kernel instead, with another result.
    """
    for dim in (2, 3):
        deviation = max((images.shape[dim] / size - 1) / 2, 0.001)
        images = gaussian_blur(images, dim, deviation, window=int(max(4 * deviation, 3)) | 1)
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)


def gaussian_blur(images: Tensor, dim: int, deviation: float, window: int) -> Tensor:
    """Convolve images with a Gaussian of `window` taps (odd) along dimension 2 or 3, reflected at the
    borders."""
    reach = window // 2
    taps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(taps**2) / (2 * deviation**2), dim=0)
    num_channels = images.shape[1]
    if dim == 2:
        kernel, padding = kernel.view(1, 1, -1, 1), (0, 0, reach, reach)
    else:
        kernel, padding = kernel.view(1, 1, 1, -1), (reach, reach, 0, 0)
    padded = F.pad(images, padding, mode="reflect")
    return F.conv2d(padded, kernel.expand(num_channels, -1, -1, -1), groups=num_channels)
