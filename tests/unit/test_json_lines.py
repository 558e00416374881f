"""JSON lines: damaged lines are reported, and no other line is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.json_lines import read_json_lines, rewrite_json_lines


def test_unreadable_tail_is_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path).rows == []
    for tail in (b'{"step": 2', b"\0" * 30, b"\xff\xff\n", b"[1]\n"):
        path.write_bytes(b'{"step": 1}\n' + tail)
        lines = read_json_lines(path)
        assert lines.rows == [{"step": 1}]
        assert lines.damage is not None and "metrics.jsonl is unreadable from line 2" in lines.damage
    path.write_bytes(b'{"step": 1}\n')
    assert read_json_lines(path).damage is None


def test_bad_line_between_good_ones_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "restarts.jsonl"
    path.write_bytes(b'{"step": 1}\nhalf\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"restarts\.jsonl is damaged: line 2"):
        read_json_lines(path)


def test_bad_lines_can_be_left_out_and_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"id": 1}\nhalf\n{"other": 2}\n{"id": 3}\n')
    lines = read_json_lines(path, lambda row: "id" in row, skip_bad=True)
    assert lines.rows == [{"id": 1}, {"id": 3}]
    assert lines.damage is not None and "2 lines, the first is line 2" in lines.damage


def test_rewrite_drops_rows_and_keeps_a_copy_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\n{"step": 2}\n{"step": 3}\n{"st')
    found = rewrite_json_lines(path, lambda row: row["step"] < 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    assert found.damage is not None and "2 lines" in found.damage and "jsonl.damaged-1" in found.damage
    assert rewrite_json_lines(tmp_path / "missing.jsonl", lambda row: True).rows == []
    assert not (tmp_path / "missing.jsonl").exists()
