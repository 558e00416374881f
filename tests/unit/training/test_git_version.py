"""The version of the code that a run records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from svd_ds.training.git_version import code_version


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Package inside a git checkout that does not track it yet."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / "other").touch()
    git(tmp_path, "init", "-q")
    commit(tmp_path, "other")
    return package


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    ended = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return ended.stdout.strip()


def commit(folder: Path, path: str) -> str:
    git(folder, "add", path)
    git(folder, "commit", "-q", "-m", "a commit")
    return git(folder, "rev-parse", "HEAD")


def test_package_in_a_checkout_has_its_commit(package: Path) -> None:
    unknown = {"version": "0.1.0", "commit": None, "dirty": None}
    assert code_version(package) == unknown, "another project's checkout"
    head = commit(package.parent, "package")
    assert code_version(package) == {"version": "0.1.0", "commit": head, "dirty": False}
    (package / "new.py").touch()
    assert code_version(package)["dirty"] is False, "caches and runs lie there too"
    (package / "__init__.py").write_text("x = 2\n")
    assert code_version(package) == {"version": "0.1.0", "commit": head, "dirty": True}


def test_package_outside_a_checkout_has_only_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", "")  # nor is there a git
    assert code_version(tmp_path)["commit"] is None
