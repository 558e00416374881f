"""The run folder: its config is checked, and metrics are cut on resume."""

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


def test_fenced_restart_replaces_no_file(tmp_path: Path) -> None:
    """Another restart has acquired the folder before the first write of this one."""
    folder = RunFolder(tmp_path / "run")
    folder.open({"a": 1}, step=0)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')

    def lost() -> None:
        raise ValueError("fenced")

    with pytest.raises(ValueError, match="fenced"):
        folder.open({"a": 2}, 0, lost)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert folder.config.read_text().startswith("a: 1\n")


def test_other_config_is_refused_with_the_key_that_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"model": {"widths": [32, 64]}, "run": {"steps": 10}}, step=0)
    folder.check_config_matches({"model": {"widths": [32, 64]}, "run": {"steps": 20}})
    folder.open({"model": {"widths": [32, 64]}, "code": {"commit": "1a2b"}}, step=0)
    folder.check_config_matches({"model": {"widths": [32, 64]}})
    with pytest.raises(ValueError, match=r"model.widths is \[32, 64\] there and \[64, 64\] here"):
        folder.check_config_matches({"model": {"widths": [64, 64]}, "run": {"steps": 10}})


def test_key_that_only_begins_like_an_allowed_one_is_checked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"running": 1}, step=0)
    with pytest.raises(ValueError, match="running is 1 there and 2 here"):
        folder.check_config_matches({"running": 2})


def test_step_name() -> None:
    assert step_name(100) == "step-0000100"


# --- damaged files


@pytest.mark.parametrize(
    "tail", [b'{"step": 4, "lo', b"\0" * 60, b"\xff\xfe\n", b'["step"]\n', b'{"stap": 4}\n']
)
def test_damaged_tail_is_reported_and_a_copy_is_kept(tmp_path: Path, tail: bytes) -> None:
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


def test_bad_line_in_the_middle_removes_no_other_line(tmp_path: Path) -> None:
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
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "binary": lambda content: b"\xff\xfe\x80" + content,
    "truncated after a line": lambda content: content[: content.index(b"\n") + 1],
    "truncated in a line": lambda content: content[:-8],
    "no mapping": lambda content: b"- 1\n...\n",
    "another value": lambda content: content.replace(b"size: 4", b"size: 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_resumes_with_a_damaged_config(tmp_path: Path, damage: str) -> None:
    folder, config = RunFolder(tmp_path), {"batch": {"size": 4}, "optim": {"lr": 0.1}}
    folder.open(config, step=0)
    intact = folder.config.read_bytes()
    if (change := DAMAGES[damage]) is None:
        folder.config.unlink()
    else:
        folder.config.write_bytes(change(intact))
    sentence = folder.check_config_matches(config)
    assert sentence is not None and f"{folder.config} is" in sentence
    with pytest.raises(ValueError, match=r"batch.size is . there and 8 here"):
        folder.check_config_matches({"batch": {"size": 8}, "optim": {"lr": 0.1}})
    (sentence,) = folder.open(config, step=0)
    assert folder.config.read_bytes() == intact and folder.check_config_matches(config) is None
    assert ("config.yaml.damaged-1" in sentence) == (damage != "missing")


def test_config_damaged_in_both_copies_is_accepted_with_a_warning(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"batch": {"size": 4}}, step=0)
    for path in (folder.config, folder.config_copy):
        path.write_bytes(b"")
    assert "could not be checked" in str(folder.check_config_matches({"batch": {"size": 8}}))


def test_config_without_a_copy_is_checked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("batch: {size: 4}\n")
    folder = RunFolder(tmp_path)
    assert folder.check_config_matches({"batch": {"size": 4}}) is None
    with pytest.raises(ValueError, match=r"batch.size is 4 there and 8 here"):
        folder.check_config_matches({"batch": {"size": 8}})


def test_files_are_fsynced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure leaves 0 bytes of a file that was renamed without an fsync."""
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


def test_run_resumes_after_its_data_moved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"data": {"path": "/old/shards", "height": 64}}, step=0)
    assert folder.check_config_matches({"data": {"path": "/new/shards", "height": 64}}) is None
    with pytest.raises(ValueError, match="height"):
        folder.check_config_matches({"data": {"path": "/new/shards", "height": 128}})
