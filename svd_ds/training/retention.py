"""The folder of a run's checkpoints, as rank 0 keeps it: whose it is, what is added to it, what stays."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from svd_ds.fsync_io import fsync_path, replace_file, set_aside, write_text
from svd_ds.settings import Settings, number
from svd_ds.weights.manifest import COMPLETE, Manifest, damage_of
from svd_ds.weights.restarts import RESTARTS, Restart, complete_checkpoints, read_restarts, restarts_damage
from svd_ds.weights.shards import KEPT_AVERAGES


@dataclass(frozen=True)
class CheckpointConfig(Settings, section="checkpoint"):
    every: int = number(1000, ge=1)
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = number(2, ge=1)
    """How many of the newest stay."""
    keep_every: int = number(0, ge=0)
    """Checkpoints at multiples of this many steps stay for good; 0 keeps none for good."""
    keep_averages: int = number(0, ge=0)
    """Of those at multiples of this many steps the averages stay, in averages/step-N: any other length can be
    made of them after the run. 0 keeps none."""
    asynchronous: bool = True
    """Train on while a checkpoint is written. Takes a copy of each rank's slices in host memory."""
    verify: bool = True
    """Before a run resumes, compare the checksum of every file of the checkpoint with its manifest. It costs
    one more reading of the files, divided over the ranks; their sizes are compared in any case."""


def acquire(folder: Path, step: int, origin: str = "", attempt: tuple[int, int] = (0, 0)) -> str:
    """Start the run after `step`; returns this start's fencing token.

    From here on an earlier start that still writes, on a node that was cut off, saves nothing that counts.

    Args:
        origin: the checkpoint named by run.resume that this start descends from (svd_ds.weights.restarts.Restart).
        attempt: the Slurm job and its restart count.

    Raises:
        ValueError: another start takes the folder over at the same moment.
    """
    life = Restart(secrets.token_hex(4), step, time.time(), origin, *attempt)
    for abandoned in folder.glob(f"{RESTARTS}.*.new"):
        abandoned.unlink(missing_ok=True)
    lives = [*read_restarts(folder), life]
    if restarts_damage(folder) is not None:
        set_aside(folder / RESTARTS)
    # A draft of its own: two starts at once must not write into one file.
    draft = folder / f"{RESTARTS}.{life.token}.new"
    write_text(draft, "".join(json.dumps(asdict(each)) + "\n" for each in lives))
    try:
        replace_file(draft, folder / RESTARTS)
    except FileNotFoundError as error:
        raise ValueError(_taken_over(folder)) from error
    if not _is_last(folder, life.token):
        raise ValueError(_taken_over(folder))
    # Of former lives. A later one's are not here yet: it would first have taken over from this one.
    for draft in folder.glob("*.tmp"):
        _remove(draft)
    for kept in (folder.parent / KEPT_AVERAGES).glob("step-*"):
        _strip(kept)
    return life.token


def draft_name(name: str, life: str) -> str:
    """Of a checkpoint as long as it is written: no two lives write into one."""
    return f"{name}.{life}.tmp"


def check_not_fenced(folder: Path, life: str) -> None:
    """Raises ValueError where another start has taken over, or where the folder is gone."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is gone: it was moved or removed while the run was training")
    if not _is_last(folder, life):
        raise ValueError(_taken_over(folder))


def _is_last(folder: Path, life: str) -> bool:
    """Whether no other start has taken over.

    One that does writes the whole file anew. So where the file is gone, or its last line is damaged, none
    has: the line was this start's.
    """
    lives = read_restarts(folder)
    return not lives or lives[-1].token == life or restarts_damage(folder) is not None


def _taken_over(folder: Path) -> str:
    return f"another start of this run has taken over {folder.parent}: this one ends and leaves it alone"


def commit(draft: Path, manifest: Manifest, config: CheckpointConfig, good: int) -> None:
    """Make a checkpoint of a draft whose files are all on disk, and remove what is old.

    Args:
        manifest: digests of the files of all ranks, and the token of the start that saved them.
        good: the newest step whose checkpoint is known to train: neither it nor a newer one is removed.

    Raises:
        ValueError: another start of the run has taken over, or a rank's file is not in the draft.
        OSError: it cannot be written.
    """
    folder, life = draft.parent, manifest.token
    check_not_fenced(folder, life)
    if damage := damage_of(draft, manifest, checksums=False):
        raise ValueError(
            f"the checkpoint {draft} lacks what a rank has written: {damage}; all "
            f"{manifest.world_size} ranks must see one run folder"
        )
    # What is told of these steps must not be lost when the run can go on behind them.
    for told in (*folder.parent.glob("*.jsonl"), *folder.parent.glob("logs/*.jsonl")):
        fsync_path(told)
    # Not `write_text`, which makes folders: who has taken over has cleared this draft away.
    (draft / COMPLETE).write_text(manifest.as_json(), encoding="utf-8")
    for written in (draft / COMPLETE, draft, *(path for path in draft.iterdir() if path.is_dir())):
        fsync_path(written)
    _put_in_place(draft, folder / draft.name.partition(".")[0], life)
    fsync_path(folder)
    _prune(folder, life, config, good)


def _put_in_place(draft: Path, final: Path, life: str) -> None:
    """Rename the draft to what it is from now on. An earlier life may have left one there, which does not
    count."""
    check_not_fenced(final.parent, life)
    aside = final.with_name(draft_name(f"{final.name}.old", life))
    if os.path.lexists(final):
        os.replace(final, aside)
        try:
            # A process may be held up for hours between two lines. If it is ours still, so was what has been
            # moved; and what another life puts here from now on, the renaming fails at.
            check_not_fenced(final.parent, life)
        except ValueError:
            os.replace(aside, final)
            raise
    os.replace(draft, final)
    _remove(aside)


def _prune(folder: Path, life: str, config: CheckpointConfig, good: int) -> None:
    """Each goes by one renaming, so that a prune that is cut short leaves nothing that looks whole, and loses
    no averages."""
    complete = complete_checkpoints(folder)
    for step, path in list(complete.items())[: -config.keep_last]:
        if step >= good or (config.keep_every and step % config.keep_every == 0):
            continue
        if config.keep_averages and step % config.keep_averages == 0:
            _keep_averages(path, folder.parent / KEPT_AVERAGES / path.name)
        else:
            old = path.with_name(draft_name(f"{path.name}.old", life))
            os.replace(path, old)
            _remove(old)


def _keep_averages(checkpoint: Path, kept: Path) -> None:
    """Move a checkpoint to where state.json, the power-function averages and the manifest stay of it: other
    averages can be made of them."""
    # One may be there since before the run went on from an earlier step.
    _remove(kept)
    kept.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, kept)
    _strip(kept)


def _strip(kept: Path) -> None:
    for path in kept.iterdir():
        if path.is_dir() and not path.name.startswith("ema-power-"):
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("state.json", COMPLETE):
            path.unlink()


def _remove(path: Path) -> None:
    """Remove a folder as far as that is possible, or a link and not what it leads to, or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
