"""Captions and annotations of samples, in common layouts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from svd_ds.data.sidecar import (
    clean_text,
    decode_caption,
    decode_text,
    parse_annotations,
    parse_captions,
    parse_json,
)


@pytest.mark.parametrize(
    ("metadata", "captions"),
    [
        ({"caption": "a"}, {"text": "a"}),
        ({"CAPTION": " a\n"}, {"text": "a"}),
        ({"title": "a", "text": "b"}, {"text": "b"}),
        ({"prompt": ["a", "b"]}, {"text": "a", "text_2": "b"}),
        ({"captions": {"coca": "a", "llm": "b"}}, {"coca": "a", "llm": "b"}),
        ({"captions": {"title": "a", "id": "b"}}, {"title": "a", "id": "b"}),
        ({"captions": {"coca": ["a", "b"]}}, {"coca": "a", "coca_2": "b"}),
        ({"captions": ["a", {"caption": "b"}, 3, None]}, {"text": "a", "text_2": "b"}),
        ({"captions": {"en": {"text": "a"}, "de": 5, "fr": None}}, {"en": "a"}),
        ({"caption": {"text": "a", "id": "7"}}, {"text": "a"}),
        ({"caption": {"en": "a"}}, {"en": "a"}),
        ({"captions": {"short": None}, "text": "a"}, {"text": "a"}),
        ({"caption": math.nan, "title": "a"}, {"text": "a"}),
        ({"caption": "", "title": "a"}, {"text": "a"}),
        ({"captions": {"a": "", "b": "x"}}, {"b": "x"}),
        ({"captions": {"a": ""}}, {"a": ""}),
        ({"annotations": [{"caption": "a"}, {"caption": "b"}, "tag"]}, {"text": "a", "text_2": "b"}),
        (["a"], {"text": "a"}),
        ("a", {"text": "a"}),
        ([{"text": "a"}], {"text": "a"}),
        ({"caption": "half \ud83d"}, {"text": "half \ufffd"}),
        ({"captions": {"a": 1}}, {}),
        ({"caption": [[[[["deep"]]]]]}, {}),
        (None, {}),
        (5, {}),
        ({}, {}),
    ],
)
def test_captions_are_found_in_json_of_any_layout(metadata: Any, captions: dict[str, str]) -> None:
    assert parse_captions(metadata) == captions


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("café".encode(), "café"),
        ("café".encode("utf-8-sig"), "café"),
        ("café “x”".encode("cp1252"), "café “x”"),
        ("café".encode("utf-16"), "café"),
        (b"", ""),
    ],
)
def test_texts_of_common_encodings_are_decoded(content: bytes, text: str) -> None:
    assert decode_text(content) == text
    assert decode_caption(b" " + content if content.isascii() else content) == text


@pytest.mark.parametrize("content", [b"\x81\xff", b"a\0b", b"\xff\xfea"])
def test_bytes_that_are_not_text_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="its text is neither UTF-8"):
        decode_text(content)


def test_texts_can_be_encoded_as_utf8() -> None:
    assert clean_text("a\ud83db\udce9") == "a\ufffdb\ufffd"
    assert clean_text("\ud83d\ude00 😀") == "😀 😀", "the halves of one character are joined"


def test_json_of_any_encoding_is_parsed_and_damage_is_a_value_error() -> None:
    for encoding in ("utf-8", "utf-8-sig", "cp1252", "utf-16"):
        assert parse_json('{"caption": "café"}'.encode(encoding)) == {"caption": "café"}
    for content in (b"", b"{", b"[" * 100_000, b"\x81"):
        with pytest.raises(ValueError, match=r"^its info\.json cannot be read: "):
            parse_json(content, "info.json")


@pytest.mark.parametrize(
    ("annotations", "kept", "dropped"),
    [
        ({"a": 1, "b": 2.5}, {"a": 1, "b": 2.5}, 0),
        ({"a": math.nan, "b": math.inf, "c": True, "d": "5", "e": [1], "f": 10**400, "g": 7}, {"g": 7}, 6),
        ({"a": None, "\ud83d": 1}, {"\ufffd": 1}, 0),
        (None, {}, 0),
        ([{"caption": "a"}], {}, 0),
        ("text", {}, 0),
    ],
)
def test_only_finite_numbers_are_annotations(annotations: Any, kept: dict[str, float], dropped: int) -> None:
    metadata = json.loads(json.dumps({"annotations": annotations}))
    assert parse_annotations(metadata) == (kept, dropped)


def test_annotations_that_are_not_an_object_are_ignored() -> None:
    assert parse_annotations([1]) == parse_annotations(None) == parse_annotations({}) == ({}, 0)
