"""Near-duplicates by hashes and by embeddings, against a comparison of all pairs."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_ds.curate.duplicates import DuplicateSettings, mark_duplicates
from svd_ds.curate.measure import perceptual_hash
from svd_ds.curate.select import ClipRecord
from tests.curation import real_shots


def clip(number: int, hashes: list[int], embeddings: list[list[float]] | None = None) -> ClipRecord:
    return ClipRecord(
        f"c{number}",
        "v.mp4",
        0,
        50,
        25.0,
        48,
        64,
        "copied",
        "c.mp4",
        0.1,
        {},
        {},
        {},
        hashes,
        embeddings or [],
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=8)), max_size=12))
@settings(max_examples=100, deadline=None)
def test_hash_pieces_find_every_pair_of_few_different_bits(flips: list[tuple[int, set[int]]]) -> None:
    bases = np.random.default_rng(0).integers(0, 2**63, 4).tolist()
    hashes = [bases[base] ^ sum(1 << bit for bit in bits) for base, bits in flips]
    clips = [clip(number, [value] * 3) for number, value in enumerate(hashes)]
    mark_duplicates(clips, DuplicateSettings(max_bits=4))
    kept: list[int] = []
    for number, value in enumerate(hashes):
        first = next((other for other in kept if (hashes[other] ^ value).bit_count() <= 4), None)
        assert clips[number].duplicate_of == (None if first is None else f"c{first}")
        if first is None:
            kept.append(number)


def test_all_three_frames_must_agree() -> None:
    clips = [clip(0, [1, 2, 3]), clip(1, [1, 2, 2**40 - 1]), clip(2, [1, 2, 7])]
    mark_duplicates(clips, DuplicateSettings())
    assert [c.duplicate_of for c in clips] == [None, None, "c0"]


def test_embeddings_are_compared_if_all_clips_have_them() -> None:
    one, other = [1.0, 0.0], [0.0, 1.0]
    near = [float(np.cos(0.2)), float(np.sin(0.2))]
    clips = [clip(0, [0], [one] * 3), clip(1, [0], [other] * 3), clip(2, [2**60 - 1], [near] * 3)]
    mark_duplicates(clips, DuplicateSettings())
    assert [c.duplicate_of for c in clips] == [None, None, "c0"]
    for c in clips:
        c.duplicate_of = None
    clips[2].embeddings = []
    mark_duplicates(clips, DuplicateSettings())
    assert [c.duplicate_of for c in clips] == [None, "c0", None]


@pytest.mark.parametrize("name", ["rabbit", "man", "street2"])
def test_hashes_survive_resizing_and_compression_and_separate_pictures(name: str) -> None:
    shots = real_shots()
    frame = shots[name][10]
    _, jpeg = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 40])
    worse = cv2.resize(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), (160, 90), interpolation=cv2.INTER_AREA)
    assert (perceptual_hash(frame) ^ perceptual_hash(worse)).bit_count() <= 4
    for other in shots.values():
        if other is not shots[name]:
            assert (perceptual_hash(frame) ^ perceptual_hash(other[10])).bit_count() > 12
