"""Captions and annotations from the JSON and text files next to a sample's pixels, in any common layout.

Every text that this module returns can be encoded as UTF-8; every number is finite.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from svd_ds.small_files import is_number

CAPTION_KEYS = ("captions", "caption", "text", "texts", "prompt", "prompts", "title", "description")
"""Keys of the captions in a JSON, the preferred ones first; case is ignored."""
MAX_DEPTH = 4
"""Levels of lists and objects that are searched for captions."""
TEXTS = ("txt", "text", "caption", "prompt")
"""Extensions of caption files, the preferred ones first."""
DEFAULT_CAPTIONER = "text"
"""Name of the captioner if a sample names none."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def clean_text(text: str) -> str:
    """Replace lone surrogates (half an emoji, a file name that is not UTF-8) by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decode_text(content: bytes) -> str:
    """Decode a text file: UTF-8 with or without a byte order mark, UTF-16 with one, else Windows-1252.

    Raises:
        ValueError: the file has none of these encodings.
    """
    encodings = ["utf-16"] if content.startswith(UTF16_MARKS) else ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise ValueError("its text is neither UTF-8, UTF-16 with a byte order mark nor Windows-1252")


def is_utf8(content: bytes) -> bool:
    """Return True if a text is UTF-8 without a fallback of `decode_text`."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def decode_caption(content: bytes) -> str:
    """Decode the caption in a text file.

    Raises:
        ValueError: the file has none of the encodings of `decode_text`.
    """
    return clean_text(decode_text(content)).strip()


def parse_json(content: bytes, name: str = "json") -> Any:
    """Parse a JSON file in an encoding of `decode_text`.

    Args:
        content: bytes of the file.
        name: name of the file for error messages.

    Raises:
        ValueError: the file is not JSON, or nested too deeply.
    """
    try:
        return json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"its {name} cannot be read: {reason}") from error


def parse_captions(metadata: Any) -> dict[str, str]:
    """Read the captions in a parsed JSON.

    The captions are the value of one of CAPTION_KEYS: a text, a list, or an object with names of captioners
    as keys; inside these may be further objects with such keys, as in `{"en": {"text": ...}}`. The JSON may
    also be a text or a list of texts itself, or have captions in a list of "annotations", as COCO does. Other
    values (null, numbers) are not captions. Empty texts are left out, unless there are no others.

    Returns:
        Captioner -> caption.
    """
    found = dict(_with_unique_names(_captions(metadata, DEFAULT_CAPTIONER, MAX_DEPTH)))
    if not found and isinstance(metadata, dict) and isinstance(metadata.get("annotations"), list):
        items = [item for item in metadata["annotations"] if isinstance(item, dict)]
        found = dict(_with_unique_names(_captions(items, DEFAULT_CAPTIONER, MAX_DEPTH)))
    not_empty = {name: text for name, text in found.items() if text}
    return not_empty or found


def parse_annotations(metadata: Any) -> tuple[dict[str, float], int]:
    """Read the annotations in a parsed JSON.

    Null counts as absent, and so do "annotations" that are not an object (a list, as in COCO).

    Returns:
        Name -> number, and the number of values that are not finite numbers.
    """
    values = metadata.get("annotations") if isinstance(metadata, dict) else None
    if not isinstance(values, dict):
        return {}, 0
    given = {clean_text(str(name)): value for name, value in values.items() if value is not None}
    kept = {name: value for name, value in given.items() if is_number(value)}
    return kept, len(given) - len(kept)


def _captions(value: Any, captioner: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield (captioner, caption) of each caption in a value, in order; a captioner may repeat."""
    if isinstance(value, str):
        yield captioner, clean_text(value).strip()
    elif depth and isinstance(value, list):
        for item in value:
            yield from _captions(item, captioner, depth - 1)
    elif depth and isinstance(value, dict):
        by_key = {key.lower(): item for key, item in value.items()}
        empty: list[tuple[str, str]] = []
        for key in (key for key in CAPTION_KEYS if key in by_key):
            found = list(_captions_under(key, by_key[key], captioner, depth - 1))
            if any(text for _, text in found):
                yield from found
                return
            empty += found
        yield from empty


def _captions_under(key: str, value: Any, captioner: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the captions under a caption key; an object there has names of captioners or caption keys."""
    if not isinstance(value, dict) or (
        key != "captions" and any(name.lower() in CAPTION_KEYS for name in value)
    ):
        yield from _captions(value, captioner, depth)
        return
    for name, item in value.items():
        yield from _captions(item, clean_text(name).strip() or captioner, depth)


def _with_unique_names(captions: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Make the names of the captioners unique: a, a_2, a_3."""
    taken: set[str] = set()
    for name, text in captions:
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        yield unique, text
