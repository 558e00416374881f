"""Paths of conf/, tools/ and sweeps/: next to svd_ds/ in the repository, inside it when installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def package_folder(name: str) -> Path:
    """Return the folder `name` (conf, tools or sweeps) of this installation; setup.py maps them."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name
