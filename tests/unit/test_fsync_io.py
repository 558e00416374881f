from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svd_ds.fsync_io import fsync_path, read_json, read_json_lines, read_yaml, replace_text, write_tensors


def test_slices_of_a_buffer_are_written_with_their_folder(tmp_path: Path) -> None:
    buffer = torch.arange(6.0, requires_grad=True)
    write_tensors(tmp_path / "a" / "b", {"first": buffer[:2], "every_other": buffer[::2]})
    found = load_file(tmp_path / "a" / "b")
    assert found["first"].tolist() == [0, 1] and found["every_other"].tolist() == [0, 2, 4]


def test_what_cannot_be_written_is_an_error_of_the_outside_world(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_tensors(tmp_path / "there", {"a": torch.zeros(1)})


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one\n", "two\n"):
        replace_text(tmp_path / "folder" / "file", text)
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]
        assert (tmp_path / "folder" / "file").read_text() == text


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 40, b"\xc3(", b"[" * 100_000])
def test_damaged_json_and_yaml_are_errors_that_name_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        read_json(path)
    if content.strip() in (b"", b"{", b"[" * 100_000):
        return
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        read_yaml(path)


def test_an_unreadable_tail_of_json_lines_is_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path).rows == []
    for tail in (b'{"step": 2', b"\0" * 30, b"\xff\xff\n", b"[1]\n"):
        path.write_bytes(b'{"step": 1}\n' + tail)
        lines = read_json_lines(path)
        assert lines.rows == [{"step": 1}]
        assert lines.damage is not None and "metrics.jsonl is unreadable from line 2" in lines.damage
    path.write_bytes(b'{"step": 1}\n')
    assert read_json_lines(path).damage is None


def test_a_bad_line_between_good_ones_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "lives.jsonl"
    path.write_bytes(b'{"step": 1}\nhalf\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"lives\.jsonl is damaged: line 2"):
        read_json_lines(path)


def test_fsync_that_a_file_system_does_not_offer_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(code: int) -> None:
        def fsync(_: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    fsync_path(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match=str(tmp_path)):
        fsync_path(tmp_path)
