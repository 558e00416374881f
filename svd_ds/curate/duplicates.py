"""Near-duplicates among clips, by CLIP embeddings if all clips have them, else by perceptual hashes.

Both methods compare the first, the middle and the last frames of two clips. The first clip of a group is
kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from svd_ds.curate.select import ClipRecord

HASH_BITS = 64
BLOCK = 1024
"""Number of clips that are compared with all others at a time; bounds the memory."""


@dataclass(frozen=True)
class DuplicateSettings:
    """Thresholds of near-duplicates."""

    max_bits: int = 4
    """Maximum number of different bits, of 64, in the hashes of two frames of the same picture."""
    min_similarity: float = 0.95
    """Minimum mean cosine of the embeddings of two clips with the same content."""


def mark_duplicates(clips: Sequence[ClipRecord], settings: DuplicateSettings) -> None:
    """Set `duplicate_of` of each clip that repeats an earlier one."""
    embedded = bool(clips) and all(clip.embeddings for clip in clips)
    pairs = _pairs_by_embedding(clips, settings) if embedded else _pairs_by_hash(clips, settings)
    for first, second in sorted(pairs):
        if clips[first].duplicate_of is None and clips[second].duplicate_of is None:
            clips[second].duplicate_of = clips[first].id


def _pairs_by_hash(clips: Sequence[ClipRecord], settings: DuplicateSettings) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) pairs whose hashes all differ in few bits.

    Hashes that differ in d bits agree in at least one of d + 1 pieces: only clips that share a piece of their
    middle hash are compared.
    """
    edges = np.linspace(0, HASH_BITS, settings.max_bits + 2).astype(int)
    sharing: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, clip in enumerate(clips):
        if not clip.hashes:
            continue
        middle = clip.hashes[len(clip.hashes) // 2]
        near: set[int] = set()
        for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            piece = (begin, (middle >> begin) & ((1 << (end - begin)) - 1))
            near.update(sharing[piece])
            sharing[piece].append(number)
        for earlier in near:
            others = clips[earlier].hashes
            if all(
                (a ^ b).bit_count() <= settings.max_bits for a, b in zip(others, clip.hashes, strict=True)
            ):
                yield earlier, number


def _pairs_by_embedding(
    clips: Sequence[ClipRecord], settings: DuplicateSettings
) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) pairs of high mean cosine; all pairs are compared."""
    embeddings = np.array([clip.embeddings for clip in clips], dtype=np.float32)
    flat = embeddings.reshape(len(clips), -1) / np.sqrt(embeddings.shape[1])
    for begin in range(0, len(clips), BLOCK):
        similar = flat[begin : begin + BLOCK] @ flat.T >= settings.min_similarity
        for later, earlier in zip(*np.nonzero(similar), strict=True):
            if earlier < later + begin:
                yield int(earlier), int(later) + begin
