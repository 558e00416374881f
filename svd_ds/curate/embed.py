"""CLIP measures of a clip: embeddings of three frames, aesthetic score, similarity of frames and captions.

CLIP is loaded from a transformers folder; arXiv 2311.15127 does not say which CLIP it uses. The aesthetic
score is a linear head on the embedding, like LAION's heads for ViT-L/14.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from svd_ds.curate.measure import read_three_frames
from svd_ds.curate.models import load_pretrained, load_tensors
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage

EMBEDDINGS = {
    "id": pa.string(),
    "embeddings": pa.list_(pa.list_(pa.float32())),
    "aesthetic": pa.float64(),
}
SIMILARITY = {"id": pa.string(), "clip_similarity": pa.float64()}


@dataclass(frozen=True)
class CLIPModelSettings:
    """Files of OpenAI's CLIP and of the aesthetic head."""

    folder: str
    """Folder of a CLIPModel and its processor, as transformers saves them."""
    aesthetic_head: str = ""
    """File with `weight` and `bias` of one or several consecutive linear layers; empty for no aesthetic
    score."""
    device: str = "cpu"


@dataclass(frozen=True)
class CLIPEmbedder:
    """CLIP and the aesthetic head, loaded. Embeddings are normalised to length 1."""

    network: Any
    processor: Any
    head: tuple[tuple[Tensor, Tensor], ...]

    @torch.no_grad()
    def embed_frames(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Embed uint8 RGB frames, each (H, W, 3): float32 (num_frames, width), on the CPU."""
        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.network.device)
        return F.normalize(self.network.get_image_features(**inputs).pooler_output.float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, truncated to CLIP's maximum length: float32 (num_texts, width), on the CPU."""
        max_length = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=max_length
        ).to(self.network.device)
        return F.normalize(self.network.get_text_features(**inputs).pooler_output.float(), dim=-1).cpu()

    def aesthetic(self, embeddings: Tensor) -> float | None:
        """Compute the mean aesthetic score of embeddings, (N, width); None without a head."""
        if not self.head:
            return None
        for weight, bias in self.head:
            embeddings = F.linear(embeddings, weight, bias)
        return round(embeddings.mean().item(), 6)


@cache
def load_clip_model(settings: CLIPModelSettings) -> CLIPEmbedder:
    """Load CLIP and the head, once per process.

    Raises:
        OSError: a file cannot be read.
        ValueError: the folder or the head has other contents, or their widths differ.
    """
    network, processor = load_pretrained("CLIPModel", "CLIPProcessor", settings.folder, settings.device)
    head = read_aesthetic_head(Path(settings.aesthetic_head)) if settings.aesthetic_head else ()
    width = int(network.config.projection_dim)
    if head and head[0][0].shape[1] != width:
        raise ValueError(
            f"the head {settings.aesthetic_head} takes embeddings of width {head[0][0].shape[1]}, "
            f"but CLIP in {settings.folder} has width {width}"
        )
    return CLIPEmbedder(network, processor, head)


def read_aesthetic_head(path: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    """Read weight and bias of each linear layer, in order; LAION's heads have no activations between layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds anything else.
    """
    tensors = load_tensors(path)
    weights = [tensors[name].float() for name in tensors if name.endswith("weight")]
    biases = [tensors[name].float() for name in tensors if name.endswith("bias")]
    if not weights or len(weights) != len(biases) or weights[-1].shape[0] != 1:
        raise ValueError(
            f"{path} must hold linear layers that end in one number, but holds {', '.join(tensors)}"
        )
    return tuple(zip(weights, biases, strict=True))


def embed_frames(
    settings: CLIPModelSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield embeddings of each clip's first, middle and last frame, and their mean aesthetic score."""
    model = load_clip_model(settings)
    for clip in inputs["clips"]:
        embeddings = model.embed_frames(read_three_frames(clip, context))
        yield {
            "id": clip["id"],
            "embeddings": embeddings.tolist(),
            "aesthetic": model.aesthetic(embeddings),
        }


def score_captions(
    settings: CLIPModelSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield the mean cosine of each clip's frames and captions."""
    model = load_clip_model(settings)
    own_captions = json.loads(inputs["probe"][0]["metadata"])["captions"]
    captions: dict[str, dict[str, str]] = {row["id"]: {} for row in inputs["embed"]}
    for stage, rows in inputs.items():
        for row in rows if stage.startswith("caption_") else ():
            captions[row["id"]][stage] = row["caption"]
    for row in inputs["embed"]:
        texts = [text for text in (*captions[row["id"]].values(), *own_captions.values()) if text]
        similarity = torch.tensor(row["embeddings"]) @ model.embed_texts(texts).T
        yield {"id": row["id"], "clip_similarity": round(similarity.mean().item(), 6)}
