from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.training.folder import RunFolder, step_name


def test_later_metrics_are_dropped_on_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open({"a": 1}, step=0)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    folder.open({"a": 1}, step=2)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_another_config_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"model": {"widths": [32, 64]}, "run": {"steps": 10}}, step=0)
    folder.check_belongs({"model": {"widths": [32, 64]}, "run": {"steps": 20}})
    folder.open({"model": {"widths": [32, 64]}, "code": {"commit": "1a2b"}}, step=0)
    folder.check_belongs({"model": {"widths": [32, 64]}})
    with pytest.raises(ValueError, match=r"model.widths is \[32, 64\] there and \[64, 64\] here"):
        folder.check_belongs({"model": {"widths": [64, 64]}, "run": {"steps": 10}})


def test_a_key_that_only_begins_like_a_free_one_is_checked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({"running": 1}, step=0)
    with pytest.raises(ValueError, match="running is 1 there and 2 here"):
        folder.check_belongs({"running": 2})


def test_names_sort_by_step() -> None:
    assert step_name(100) == "step-0000100"
