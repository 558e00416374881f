"""Cached CLIP embeddings of a sample: one file of tensors next to its pixels (docs/cache.md).

    image           (T, D)  image embedding of each stored frame, cropped in the same way as its latents
    text/CAPTIONER  (L, D)  text embeddings of a caption, one for each token

Shape legend: T frames, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from svd_ds.data import cached_tensors
from svd_ds.data.cached_tensors import TensorFile

MEMBER = "clip_embeddings.safetensors"
"""Extension of the file with a sample's CLIP embeddings."""


@dataclass(frozen=True)
class EmbeddingsOrigin:
    """Source of a file's CLIP embeddings: the size of the frames, and the encoders."""

    height: int
    """Height of the encoded frames in pixels."""
    width: int
    """Width of the encoded frames in pixels."""
    image_encoder: str | None
    """Fingerprint of the image encoder (`model.frozen.fingerprint`); None if the file has no image
    embeddings."""
    text_encoder: str | None
    """Fingerprint of the text encoder; None if the file has no text embeddings."""

    def encoder(self, context: str) -> str | None:
        """Return the fingerprint of the encoder for a `context`: image, ends or text.

        None if the file has no embeddings for it.
        """
        return self.text_encoder if context == "text" else self.image_encoder


def pack(image: Tensor | None, texts: Mapping[str, Tensor], origin: EmbeddingsOrigin) -> bytes:
    """Serialize the CLIP embeddings of a sample; they are rounded to float16.

    Args:
        image: embeddings of all stored frames, float, (T, D); None leaves them out.
        texts: captioner -> embeddings of its caption, float, (L, D).
        origin: source of the embeddings.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: an embedding is not finite in float16.
    """
    images = {} if image is None else {"image": image}
    captions = {f"text/{captioner}": text_LD for captioner, text_LD in texts.items()}
    return cached_tensors.pack(images | captions, asdict(origin))


def read_origin(file: TensorFile) -> EmbeddingsOrigin:
    """Return the source of a file's embeddings.

    Raises:
        ValueError: `pack` did not write the file.
    """
    return file.parse_origin(EmbeddingsOrigin)


def embedding_shape(file: TensorFile, context: str) -> tuple[int, ...]:
    """Return the shape of the embeddings for a `context`: (D,) of images, (L, D) of texts, () if missing.

    Raises:
        ValueError: the file is damaged.
    """
    shapes = file.shapes()
    if context != "text":
        return shapes.get("image", ())[1:]
    return next((shape for name, shape in shapes.items() if name.startswith("text/")), ())


def read(file: TensorFile, context: str, frames: Sequence[int], captioner: str) -> Tensor:
    """Read the embeddings that are the context of a network's cross-attention.

    Args:
        file: file of a sample's embeddings.
        context: `text` reads the embeddings of the caption, `image` that of the clip's first frame, `ends`
            those of its first and last frame.
        frames: numbers of the clip's frames among the stored ones.
        captioner: name of the captioner whose caption is read.

    Returns:
        Embeddings, float16, (L, D).

    Raises:
        ValueError: an embedding is missing or damaged.
    """
    if context == "text":
        return file.tensor(f"text/{captioner}")
    return file.rows("image", [frames[0], frames[-1]] if context == "ends" else [frames[0]])
