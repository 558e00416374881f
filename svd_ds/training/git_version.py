"""Version of the code that a run uses."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def code_version(package: Path = PACKAGE) -> dict[str, Any]:
    """Return the version of the package, its git commit, and dirty: True if tracked files differ from the
    commit.

    commit and dirty are None if the package is not in a checkout of its own repository.
    """
    found: dict[str, Any] = {"version": version("svd_ds"), "commit": None, "dirty": None}
    try:
        # An installed package may be inside another project's checkout.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"commit": commit, "dirty": changed != ""}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
