"""What the files next to a sample's pixels say of it: captions and annotations, whatever their shape.

Every text that this module returns can be encoded as UTF-8; every number is finite.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from svd_ds.small_files import is_number

CAPTION_KEYS = ("captions", "caption", "text", "texts", "prompt", "prompts", "title", "description")
"""Names under which a json has its captions, the preferred ones first; upper and lower case are the same."""
MAX_DEPTH = 4
"""Levels of lists and objects in which captions are looked for."""
TEXTS = ("txt", "text", "caption", "prompt")
"""Extensions of a file that is a caption, the preferred ones first."""
DEFAULT_CAPTIONER = "text"
"""Name of the captioner where a sample names none."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def clean_text(text: str) -> str:
    """A text without lone surrogates (half an emoji, a name that is not UTF-8): U+FFFD takes their place."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decode_text(content: bytes) -> str:
    """The text of a file: UTF-8 or UTF-16 with or without a byte order mark, else Windows-1252.

    Raises:
        ValueError: the bytes are none of these.
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
    """Whether a text is UTF-8, so that `decode_text` need not try anything else."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def decode_caption(content: bytes) -> str:
    """The caption in a text file. Raises ValueError as `decode_text` does."""
    return clean_text(decode_text(content)).strip()


def parse_json(content: bytes, name: str = "json") -> Any:
    """The value of a JSON file, by the encodings of `decode_text`.

    Raises:
        ValueError: it is no JSON, or nested too deeply; the message says that this is its `name`.
    """
    try:
        return json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"its {name} cannot be read: {reason}") from error


def parse_captions(about: Any) -> dict[str, str]:
    """Captioner -> caption, from a sample's json.

    A json has its captions under one of CAPTION_KEYS, as a text, a list, or an object by captioner's name;
    inside these may be further objects with such keys, as in `{"en": {"text": ...}}`. It may also be a text
    or a list of texts itself, or have them in a list of "annotations", as COCO does. Anything else (null,
    numbers) is no caption. Empty texts are left out, unless there are no others.
    """
    found = dict(_numbered(_captions(about, DEFAULT_CAPTIONER, MAX_DEPTH)))
    if not found and isinstance(about, dict) and isinstance(about.get("annotations"), list):
        items = [item for item in about["annotations"] if isinstance(item, dict)]
        found = dict(_numbered(_captions(items, DEFAULT_CAPTIONER, MAX_DEPTH)))
    spoken = {name: text for name, text in found.items() if text}
    return spoken or found


def parse_annotations(about: Any) -> tuple[dict[str, float], int]:
    """Numbers by name from a json's "annotations", and how many values there were no finite numbers.

    Null counts as absent, and "annotations" that are no object (a list, as COCO has it) as none.
    """
    values = about.get("annotations") if isinstance(about, dict) else None
    if not isinstance(values, dict):
        return {}, 0
    given = {clean_text(str(name)): value for name, value in values.items() if value is not None}
    kept = {name: value for name, value in given.items() if is_number(value)}
    return kept, len(given) - len(kept)


def _captions(value: Any, captioner: str, depth: int) -> Iterator[tuple[str, str]]:
    """(captioner, caption) of each caption in a value, in its order; a captioner may come several times."""
    if isinstance(value, str):
        yield captioner, clean_text(value).strip()
    elif depth and isinstance(value, list):
        for item in value:
            yield from _captions(item, captioner, depth - 1)
    elif depth and isinstance(value, dict):
        by_key = {key.lower(): item for key, item in value.items()}
        empty: list[tuple[str, str]] = []
        for key in (key for key in CAPTION_KEYS if key in by_key):
            found = list(_under(key, by_key[key], captioner, depth - 1))
            if any(text for _, text in found):
                yield from found
                return
            empty += found
        yield from empty


def _under(key: str, value: Any, captioner: str, depth: int) -> Iterator[tuple[str, str]]:
    """Captions under a caption key: an object there holds captions by captioner's name, or further keys."""
    if not isinstance(value, dict) or (
        key != "captions" and any(name.lower() in CAPTION_KEYS for name in value)
    ):
        yield from _captions(value, captioner, depth)
        return
    for name, item in value.items():
        yield from _captions(item, clean_text(name).strip() or captioner, depth)


def _numbered(captions: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same with names that differ: a, a_2, a_3."""
    taken: set[str] = set()
    for name, text in captions:
        free, count = name, 1
        while free in taken:
            count += 1
            free = f"{name}_{count}"
        taken.add(free)
        yield free, text
