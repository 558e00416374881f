"""What CLIP says of a clip: embeddings of three frames, how much it pleases, how well its captions fit.

CLIP is a transformers folder; its kind is not named in arXiv 2311.15127. The aesthetic score is a linear
head on the embedding, as LAION's are for ViT-L/14.
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

from svd_ds.curate.measure import three_frames
from svd_ds.curate.models import load, load_tensors
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row

EMBEDDINGS = {
    "id": pa.string(),
    "embeddings": pa.list_(pa.list_(pa.float32())),
    "aesthetic": pa.float64(),
}
SIMILARITY = {"id": pa.string(), "clip_similarity": pa.float64()}


@dataclass(frozen=True)
class ClipModelSettings:
    folder: str
    """Of a CLIPModel and its processor, as transformers saves them."""
    head: str = ""
    """File of the aesthetic head: `weight` and `bias` of one linear layer, or of several in a row. Empty:
    none."""
    device: str = "cpu"


@dataclass(frozen=True)
class ClipModel:
    """CLIP and the aesthetic head, loaded. Embeddings have length 1."""

    network: Any
    processor: Any
    head: tuple[tuple[Tensor, Tensor], ...]

    @torch.no_grad()
    def embed_frames(self, frames: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB, (H, W, 3) each -> float32, (number, width), on the CPU."""
        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.network.device)
        return F.normalize(self.network.get_image_features(**inputs).pooler_output.float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut to what CLIP takes -> float32, (number, width), on the CPU."""
        most = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=most
        ).to(self.network.device)
        return F.normalize(self.network.get_text_features(**inputs).pooler_output.float(), dim=-1).cpu()

    def aesthetic(self, embeddings: Tensor) -> float | None:
        """Mean score of some embeddings; None without a head."""
        if not self.head:
            return None
        for weight, bias in self.head:
            embeddings = F.linear(embeddings, weight, bias)
        return round(embeddings.mean().item(), 6)


@cache
def load_clip(settings: ClipModelSettings) -> ClipModel:
    """One a process. Raises OSError or ValueError where the folder or the head cannot be used."""
    network, processor = load("CLIPModel", "CLIPProcessor", settings.folder, settings.device)
    head = read_head(Path(settings.head)) if settings.head else ()
    width = int(network.config.projection_dim)
    if head and head[0][0].shape[1] != width:
        raise ValueError(
            f"the head {settings.head} takes {head[0][0].shape[1]} numbers, "
            f"and CLIP in {settings.folder} gives {width}"
        )
    return ClipModel(network, processor, head)


def read_head(path: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    """Weight and bias of each linear layer, in order: LAION's heads have nothing between them.

    Raises FileNotFoundError, or ValueError where the file holds anything else.
    """
    tensors = load_tensors(path)
    weights = [tensors[name].float() for name in tensors if name.endswith("weight")]
    biases = [tensors[name].float() for name in tensors if name.endswith("bias")]
    if not weights or len(weights) != len(biases) or weights[-1].shape[0] != 1:
        raise ValueError(f"{path} holds no linear layers that end in one number, but {', '.join(tensors)}")
    return tuple(zip(weights, biases, strict=True))


def embed(settings: ClipModelSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """Embeddings of each clip's first, middle and last frame, and their mean aesthetic score."""
    model = load_clip(settings)
    for clip in known["clips"]:
        embeddings = model.embed_frames(three_frames(clip, place))
        yield {
            "id": clip["id"],
            "embeddings": embeddings.tolist(),
            "aesthetic": model.aesthetic(embeddings),
        }


def compare(settings: ClipModelSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """Cosine of each clip's frames and captions: its mean over both."""
    model = load_clip(settings)
    told = json.loads(known["probe"][0]["told"])["captions"]
    captions: dict[str, dict[str, str]] = {row["id"]: {} for row in known["embed"]}
    for stage, rows in known.items():
        for row in rows if stage.startswith("caption_") else ():
            captions[row["id"]][stage] = row["caption"]
    for row in known["embed"]:
        texts = [text for text in (*captions[row["id"]].values(), *told.values()) if text]
        similarity = torch.tensor(row["embeddings"]) @ model.embed_texts(texts).T
        yield {"id": row["id"], "clip_similarity": round(similarity.mean().item(), 6)}
