from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svd_ds.training.durable import replace_text, write_tensors


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
