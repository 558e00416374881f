"""Near-duplicates among clips: by CLIP's embeddings where there are some, else by perceptual hashes.

Both compare first with first, middle with middle, last with last frame. The first clip of a group stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from svd_ds.curate.select import Clip

HASH_BITS = 64
BLOCK = 1024
"""Clips compared with all others at a time: bounds the memory."""


@dataclass(frozen=True)
class DuplicateSettings:
    max_bits: int = 4
    """Of 64, in which the hashes of two frames of one picture may differ."""
    min_similarity: float = 0.95
    """Mean cosine of the embeddings of two clips that show the same."""


def mark_duplicates(clips: Sequence[Clip], settings: DuplicateSettings) -> None:
    """Name, in each clip that repeats an earlier one, the first such."""
    embedded = bool(clips) and all(clip.embeddings for clip in clips)
    pairs = _alike_embeddings(clips, settings) if embedded else _alike_hashes(clips, settings)
    for first, second in sorted(pairs):
        if clips[first].duplicate_of is None and clips[second].duplicate_of is None:
            clips[second].duplicate_of = clips[first].id


def _alike_hashes(clips: Sequence[Clip], settings: DuplicateSettings) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) whose hashes all differ in few bits.

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


def _alike_embeddings(clips: Sequence[Clip], settings: DuplicateSettings) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of high mean cosine; every clip is compared with every other."""
    embeddings = np.array([clip.embeddings for clip in clips], dtype=np.float32)
    flat = embeddings.reshape(len(clips), -1) / np.sqrt(embeddings.shape[1])
    for begin in range(0, len(clips), BLOCK):
        similar = flat[begin : begin + BLOCK] @ flat.T >= settings.min_similarity
        for later, earlier in zip(*np.nonzero(similar), strict=True):
            if earlier < later + begin:
                yield int(earlier), int(later) + begin
