"""Position in the data: a cursor is stored as JSON and refuses other data."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from svd_ds.data.cursor import Cursor


def test_round_trip_through_json() -> None:
    cursor = Cursor(96, "0123456789abcdef")
    assert Cursor(**json.loads(json.dumps(asdict(cursor)))) == cursor


def test_cursor_of_other_data_is_refused_with_both_fingerprints() -> None:
    cursor = Cursor(96, "aaaa")
    cursor.check("aaaa", "shards")
    with pytest.raises(ValueError, match=r"96 samples .* aaaa.* shards .* bbbb"):
        cursor.check("bbbb", "shards")
