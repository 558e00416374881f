"""Writing that is fsynced: files are replaced completely, and errors name the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svd_ds.fsync_io import LineFile, fsync_path, keep_damaged_copy, replace_text, write_tensors, write_text
from svd_ds.small_files import read_json, read_yaml


def test_slices_of_a_buffer_are_written_with_their_folder(tmp_path: Path) -> None:
    buffer = torch.arange(6.0, requires_grad=True)
    write_tensors(tmp_path / "a" / "b", {"first": buffer[:2], "every_other": buffer[::2]})
    found = load_file(tmp_path / "a" / "b")
    assert found["first"].tolist() == [0, 1] and found["every_other"].tolist() == [0, 2, 4]


def test_tensors_that_cannot_be_written_raise_oserror(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_tensors(tmp_path / "there", {"a": torch.zeros(1)})


def test_file_is_replaced_completely(tmp_path: Path) -> None:
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


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_text(full, "x")
    lines = LineFile(full)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        lines.append("x")
    lines.close()
    (tmp_path / "file.new").mkdir()
    with pytest.raises(OSError, match=r"file\.new'"):
        replace_text(tmp_path / "file", "x")


def test_lines_are_complete_after_each_append(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "log")
    for text in ("one", "two \ud800"):
        lines.append(text)
        assert (tmp_path / "log").read_bytes().endswith(b"\n")
    lines.append_row({"a": 1})
    lines.close()
    assert (tmp_path / "log").read_text().splitlines() == ["one", "two \\ud800", '{"a": 1}']


def test_damaged_files_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for content in ("one", "two"):
        path.write_text(content)
        assert keep_damaged_copy(path).read_text() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "state.json",
        "state.json.damaged-1",
        "state.json.damaged-2",
    ]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EISDIR])
def test_folder_that_cannot_be_fsynced_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked: list[object] = []

    def refused(path: object, *_: object) -> int:
        asked.append(path)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    fsync_path(tmp_path)
    assert asked == [tmp_path]
