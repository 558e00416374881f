"""Verification of checkpoints: a run resumes from the newest one whose files are intact.

All ranks take part: each verifies a share of the files, and all get the same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

from svd_ds.fsync_io import fsync_path
from svd_ds.parallel.collectives import (
    SharedError,
    all_gather_objects,
    broadcast_from_rank0,
    raise_on_all_ranks,
)
from svd_ds.parallel.env import Env
from svd_ds.weights.manifest import Manifest, find_damage, read_manifest
from svd_ds.weights.restarts import numbered_checkpoints, read_manifest_or_none
from svd_ds.weights.shards import DAMAGED_SUFFIX


def find_damage_on_all_ranks(path: Path, env: Env, checksums: bool) -> str | None:
    """Find the first damaged file of a checkpoint. All ranks call it.

    Args:
        checksums: compare the checksums of the files as well as their sizes.

    Returns:
        The name of the file and its damage; None if the checkpoint is intact.

    Raises:
        SharedError: rank 0 sees the checkpoint and another rank does not.
    """
    manifest, damage = broadcast_from_rank0(lambda: _compare_sizes(path))
    if manifest is None or damage is not None or not checksums:
        return damage
    # If the number of ranks is that of the save, each rank verifies the files that it is about to load.
    names = sorted(manifest.files, key=lambda name: (name.rpartition("/")[2], name))
    damage = raise_on_all_ranks(lambda: _find_damage_in_share(path, manifest, names, env))
    return next(iter(all_gather_objects([damage] if damage else [])), None)


def check_checkpoint_on_all_ranks(path: Path, env: Env, checksums: bool) -> None:
    """Verify a checkpoint that the user named. All ranks call it.

    Raises:
        SharedError: it is damaged; the message names the file.
    """
    if damage := find_damage_on_all_ranks(path, env, checksums):
        raise SharedError(f"the checkpoint {path} is damaged: {damage}; resume from another one")


def newest_intact_checkpoint(
    folder: Path,
    env: Env,
    checksums: bool,
    is_proven: Callable[[int, Manifest], bool] = lambda step, manifest: True,
) -> Path | None:
    """Find the newest intact checkpoint in a run's folder of checkpoints. All ranks call it.

    Newer ones are renamed and kept, and rank 0 prints a warning that names them.

    Args:
        checksums: compare the checksums of the files as well as their sizes.
        is_proven: function of step and manifest that returns True if the checkpoint is proven; others are
            used only if no proven checkpoint is intact.

    Returns:
        Its path; None if there are no checkpoints.

    Raises:
        SharedError: there are checkpoints, and all of them are damaged.
    """
    candidates = broadcast_from_rank0(lambda: _candidates(folder, is_proven))
    damaged: dict[Path, str] = {}
    # Proven checkpoints first: an unproven one is used only if no proven one is intact.
    for path in sorted(candidates, key=lambda path: candidates[path], reverse=True):
        damage = find_damage_on_all_ranks(path, env, checksums)
        if damage is None:
            doubtful = [other for other in candidates if candidates[other][1] > candidates[path][1]]
            unused = dict.fromkeys(doubtful, "no training step was taken from it") | damaged
            if unused:
                broadcast_from_rank0(partial(_set_aside, path, unused))
            return path
        if not broadcast_from_rank0(path.is_dir):
            # Another restart of this run has just pruned it: look again.
            return newest_intact_checkpoint(folder, env, checksums, is_proven)
        damaged[path] = damage
    if damaged:
        raise SharedError(
            f"no checkpoint in {folder} is intact: {_list(damaged)}; copy one back from elsewhere, or move "
            f"{folder} away to train from the beginning"
        )
    return None


def _candidates(folder: Path, is_proven: Callable[[int, Manifest], bool]) -> dict[Path, tuple[bool, int]]:
    """Return path -> (True unless the manifest shows that the checkpoint is not proven, its step)."""
    found = {}
    for step, path in numbered_checkpoints(folder).items():
        manifest = read_manifest_or_none(path)
        found[path] = (manifest is None or is_proven(step, manifest), step)
    return found


def _compare_sizes(path: Path) -> tuple[Manifest | None, str | None]:
    try:
        manifest = read_manifest(path)
    except (ValueError, OSError) as error:
        return None, str(error)
    return manifest, find_damage(path, manifest, checksums=False)


def _find_damage_in_share(path: Path, manifest: Manifest, names: list[str], env: Env) -> str | None:
    share = names[env.rank :: env.world]
    if not path.is_dir():
        # This must not count as damage, or the other ranks would rename an intact checkpoint.
        raise ValueError(
            f"rank {env.rank} does not see {path}, as rank 0 does: all ranks must share the run folder"
        )
    return find_damage(path, manifest, share)


def _set_aside(chosen: Path, unused: dict[Path, str]) -> None:
    """Rename the checkpoints that are not used, so that they are neither pruned nor replaced."""
    for path in unused:
        names = (path.with_name(path.name + DAMAGED_SUFFIX + (f"-{i}" if i > 1 else "")) for i in count(1))
        try:
            os.replace(path, next(name for name in names if not name.exists()))
        except FileNotFoundError:
            continue  # pruned meanwhile, by another restart of this run
    fsync_path(chosen.parent)
    print(
        f"warning: the run resumes from {chosen}; these checkpoints are kept as *{DAMAGED_SUFFIX} and not "
        f"used: {_list(unused)}",
        flush=True,
    )


def _list(unused: dict[Path, str]) -> str:
    return ", ".join(f"{path.name} ({damage})" for path, damage in unused.items())
