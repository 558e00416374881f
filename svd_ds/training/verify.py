"""Which checkpoint a run resumes from: the newest whose files are all as they were written.

All ranks take part: each reads a share of the files, and all of them come to the same decision.
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
    """The first damaged file of a checkpoint and how it differs, None where it is whole. All ranks call it.

    Args:
        checksums: also compare the files' checksums, and not their sizes alone.

    Raises:
        SharedError: rank 0 sees the checkpoint and another rank does not.
    """
    manifest, damage = broadcast_from_rank0(lambda: _look_at_sizes(path))
    if manifest is None or damage is not None or not checksums:
        return damage
    # As many ranks as saved it read their own files, which they are about to load.
    names = sorted(manifest.files, key=lambda name: (name.rpartition("/")[2], name))
    own = raise_on_all_ranks(lambda: _damage_of_share(path, manifest, names, env))
    return next(iter(all_gather_objects([own] if own else [])), None)


def check_checkpoint_on_all_ranks(path: Path, env: Env, checksums: bool) -> None:
    """Verify a checkpoint that was asked for by name. All ranks call it.

    Raises:
        SharedError: it is damaged; the message names the file.
    """
    if damage := find_damage_on_all_ranks(path, env, checksums):
        raise SharedError(f"the checkpoint {path} is damaged: {damage}; resume from another one")


def newest_intact_checkpoint(
    folder: Path,
    env: Env,
    checksums: bool,
    is_good: Callable[[int, Manifest], bool] = lambda step, manifest: True,
) -> Path | None:
    """The newest checkpoint in a run's folder of them that is whole, None where there is none at all.

    Newer ones are kept under another name, and rank 0 prints a warning that names them. All ranks call it.

    Args:
        is_good: whether a whole checkpoint of this step may be used, where there is one that may.

    Raises:
        SharedError: there are checkpoints, and all of them are damaged.
    """
    candidates = broadcast_from_rank0(lambda: _candidates(folder, is_good))
    damaged: dict[Path, str] = {}
    # Where none of those that may be used is whole, one of the others is better than none.
    for path in sorted(candidates, key=lambda path: candidates[path], reverse=True):
        damage = find_damage_on_all_ranks(path, env, checksums)
        if damage is None:
            doubtful = [other for other in candidates if candidates[other][1] > candidates[path][1]]
            passed = dict.fromkeys(doubtful, "no training step was taken from it") | damaged
            if passed:
                broadcast_from_rank0(partial(_set_aside, path, passed))
            return path
        if not broadcast_from_rank0(path.is_dir):
            # Another start of this run has just pruned it: what there is has changed.
            return newest_intact_checkpoint(folder, env, checksums, is_good)
        damaged[path] = damage
    if damaged:
        raise SharedError(
            f"no checkpoint in {folder} is whole: {_list(damaged)}; copy one back from elsewhere, or move "
            f"{folder} away to train from the beginning"
        )
    return None


def _candidates(folder: Path, is_good: Callable[[int, Manifest], bool]) -> dict[Path, tuple[bool, int]]:
    """Checkpoint -> whether it may be used, and its step."""
    found = {}
    for step, path in numbered_checkpoints(folder).items():
        manifest = read_manifest_or_none(path)
        found[path] = (manifest is None or is_good(step, manifest), step)
    return found


def _look_at_sizes(path: Path) -> tuple[Manifest | None, str | None]:
    try:
        manifest = read_manifest(path)
    except (ValueError, OSError) as error:
        return None, str(error)
    return manifest, find_damage(path, manifest, checksums=False)


def _damage_of_share(path: Path, manifest: Manifest, names: list[str], env: Env) -> str | None:
    share = names[env.rank :: env.world]
    if not path.is_dir():
        # Must not be taken for damage, for which the others would set a good checkpoint aside.
        raise ValueError(
            f"rank {env.rank} does not see {path}, as rank 0 does: all ranks must share the run folder"
        )
    return find_damage(path, manifest, share)


def _set_aside(chosen: Path, passed: dict[Path, str]) -> None:
    """Rename the checkpoints that were passed over, so that they are neither used, pruned nor replaced."""
    for path in passed:
        names = (path.with_name(path.name + DAMAGED_SUFFIX + (f"-{i}" if i > 1 else "")) for i in count(1))
        try:
            os.replace(path, next(name for name in names if not name.exists()))
        except FileNotFoundError:
            continue  # pruned meanwhile, by another start of this run
    fsync_path(chosen.parent)
    print(
        f"warning: the run resumes from {chosen}; these checkpoints are kept as *{DAMAGED_SUFFIX} and not "
        f"used: {_list(passed)}",
        flush=True,
    )


def _list(passed: dict[Path, str]) -> str:
    return ", ".join(f"{path.name} ({damage})" for path, damage in passed.items())
