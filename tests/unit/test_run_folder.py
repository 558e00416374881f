from __future__ import annotations

import os
from pathlib import Path

import pytest

from svd_ds.run_folder import RunFolder, step_name


def test_later_metrics_are_dropped_on_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open({"a": 1}, step=0)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    folder.open({"a": 1}, step=2)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_start_that_lost_the_folder_replaces_no_file(tmp_path: Path) -> None:
    """Another start has taken the folder over between this one's own take-over and its first write there."""
    folder = RunFolder(tmp_path / "run")
    folder.open({"a": 1}, step=0)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')

    def lost() -> None:
        raise ValueError("taken over")

    with pytest.raises(ValueError, match="taken over"):
        folder.open({"a": 2}, 0, lost)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert folder.config.read_text().startswith("a: 1\n")


def test_another_config_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"model": {"widths": [32, 64]}, "run": {"steps": 10}}, step=0)
    folder.check_config_matches({"model": {"widths": [32, 64]}, "run": {"steps": 20}})
    folder.open({"model": {"widths": [32, 64]}, "code": {"commit": "1a2b"}}, step=0)
    folder.check_config_matches({"model": {"widths": [32, 64]}})
    with pytest.raises(ValueError, match=r"model.widths is \[32, 64\] there and \[64, 64\] here"):
        folder.check_config_matches({"model": {"widths": [64, 64]}, "run": {"steps": 10}})


def test_a_key_that_only_begins_like_a_free_one_is_checked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"running": 1}, step=0)
    with pytest.raises(ValueError, match="running is 1 there and 2 here"):
        folder.check_config_matches({"running": 2})


def test_names_sort_by_step() -> None:
    assert step_name(100) == "step-0000100"


# --- damaged files


@pytest.mark.parametrize(
    "tail", [b'{"step": 4, "lo', b"\0" * 60, b"\xff\xfe\n", b'["step"]\n', b'{"stap": 4}\n']
)
def test_a_damaged_tail_is_kept_next_to_its_file_and_reported(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder(tmp_path)
    assert folder.open({"a": 1}, step=0) == []
    for path in (folder.metrics, folder.evaluation, folder.skipped, folder.quarantine):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    damage = folder.open({"a": 1}, step=2)
    assert len(damage) == 4 and "logs/skipped.jsonl is unreadable from line 3 on" in damage[2]
    for path in (folder.metrics, folder.evaluation, folder.skipped, folder.quarantine):
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
        assert path.with_name(f"{path.name}.damaged-1").read_bytes().endswith(tail)
    assert folder.open({"a": 1}, step=2) == []


def test_a_bad_line_in_the_middle_costs_no_other_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"a": 1}, step=0)
    folder.metrics.write_text('{"step": 1}\n{"st\x00p": 2}\n{"step": 3}\n')
    (sentence,) = folder.open({"a": 1}, step=3)
    assert "metrics.jsonl is damaged: line 2" in sentence and sentence.endswith("metrics.jsonl.damaged-1")
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("content", [None, "", '{"step": 1}\n'])
def test_metrics_that_end_before_the_checkpoint_are_reported(tmp_path: Path, content: str | None) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"a": 1}, step=0)
    (folder.checkpoints / step_name(4)).mkdir()
    if content is not None:
        folder.metrics.write_text(content)
    (sentence,) = folder.open({"a": 1}, step=4)
    assert f"metrics.jsonl ends at step {1 if content else 0}" in sentence


DAMAGES = {
    "missing": None,
    "empty": lambda whole: b"",
    "zeroed": lambda whole: bytes(len(whole)),
    "binary": lambda whole: b"\xff\xfe\x80" + whole,
    "cut short at a line": lambda whole: whole[: whole.index(b"\n") + 1],
    "cut short in a line": lambda whole: whole[:-8],
    "no mapping": lambda whole: b"- 1\n...\n",
    "another value": lambda whole: whole.replace(b"size: 4", b"size: 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_gives_no_run_up(tmp_path: Path, damage: str) -> None:
    folder, config = RunFolder(tmp_path), {"batch": {"size": 4}, "optim": {"lr": 0.1}}
    folder.open(config, step=0)
    whole = folder.config.read_bytes()
    if (change := DAMAGES[damage]) is None:
        folder.config.unlink()
    else:
        folder.config.write_bytes(change(whole))
    sentence = folder.check_config_matches(config)
    assert sentence is not None and f"{folder.config} is" in sentence
    with pytest.raises(ValueError, match=r"batch.size is . there and 8 here"):
        folder.check_config_matches({"batch": {"size": 8}, "optim": {"lr": 0.1}})
    (told,) = folder.open(config, step=0)
    assert folder.config.read_bytes() == whole and folder.check_config_matches(config) is None
    assert ("config.yaml.damaged-1" in told) == (damage != "missing")


def test_a_config_that_is_damaged_twice_is_taken_with_a_warning(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"batch": {"size": 4}}, step=0)
    for path in (folder.config, folder.config_copy):
        path.write_bytes(b"")
    assert "could not be checked" in str(folder.check_config_matches({"batch": {"size": 8}}))


def test_a_config_without_a_copy_is_checked_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("batch: {size: 4}\n")
    folder = RunFolder(tmp_path)
    assert folder.check_config_matches({"batch": {"size": 4}}) is None
    with pytest.raises(ValueError, match=r"batch.size is 4 there and 8 here"):
        folder.check_config_matches({"batch": {"size": 8}})


def test_files_of_a_run_are_on_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves 0 bytes of what was renamed without an fsync."""
    synced: list[str] = []
    rename, fsync = os.replace, os.fsync

    def watched_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert str(source) in synced, target
        rename(source, target)

    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.metrics.write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    folder.open({"a": 1}, step=1)
    assert {f"{tmp_path}/config.yaml.new", f"{tmp_path}/metrics.jsonl.new", str(tmp_path)} <= set(synced)


def test_a_run_resumes_where_its_data_moved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"data": {"path": "/old/shards", "height": 64}}, step=0)
    assert folder.check_config_matches({"data": {"path": "/new/shards", "height": 64}}) is None
    with pytest.raises(ValueError, match="height"):
        folder.check_config_matches({"data": {"path": "/new/shards", "height": 128}})
