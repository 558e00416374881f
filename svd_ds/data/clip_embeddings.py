"""A sample's cached CLIP states: one file of tensors beside its pixels (docs/cache.md).

    image           (T, D)  the image encoder's token of each stored frame, cropped as its latents are
    text/CAPTIONER  (L, D)  the text encoder's states of a caption

Shape legend: T frames, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from svd_ds.data import cached_tensors
from svd_ds.data.cached_tensors import TensorFile

MEMBER = "clip.safetensors"
"""Extension of a sample's states."""


@dataclass(frozen=True)
class EmbeddingsOrigin:
    """What the states were made of and by."""

    height: int
    """Of the frames that were encoded, in pixels."""
    width: int
    image_encoder: str | None
    """See `model.frozen.fingerprint`; None where the file has no states of that kind."""
    text_encoder: str | None

    def encoder(self, context: str) -> str | None:
        """That of the states which `context` wants: image, ends or text."""
        return self.text_encoder if context == "text" else self.image_encoder


def pack(image_TD: Tensor | None, texts_LD: Mapping[str, Tensor], origin: EmbeddingsOrigin) -> bytes:
    """The file's bytes; states are rounded to float16. ValueError for states that are not finite then."""
    images = {} if image_TD is None else {"image": image_TD}
    texts = {f"text/{captioner}": states_LD for captioner, states_LD in texts_LD.items()}
    return cached_tensors.pack(images | texts, asdict(origin))


def read_origin(file: TensorFile) -> EmbeddingsOrigin:
    """Raises ValueError where the file is not of `pack`."""
    try:
        return EmbeddingsOrigin(**file.origin)
    except TypeError as error:
        raise ValueError(f"its {MEMBER} does not say what it was made of") from error


def embedding_shape(file: TensorFile, context: str) -> tuple[int, ...]:
    """What the states for a `context` have in common: (D,) of the images', (L, D) of the texts'."""
    shapes = file.shapes()
    if context != "text":
        return shapes.get("image", ())[1:]
    return next((shape for name, shape in shapes.items() if name.startswith("text/")), ())


def read(file: TensorFile, context: str, frames: Sequence[int], captioner: str) -> Tensor:
    """What a network with that `context` sees, float16 (L, D): the caption's states, the token of the clip's
    first frame, or for `ends` those of its first and last. Raises ValueError where they are not all there."""
    if context == "text":
        return file.tensor(f"text/{captioner}")
    return file.rows("image", [frames[0], frames[-1]] if context == "ends" else [frames[0]])
