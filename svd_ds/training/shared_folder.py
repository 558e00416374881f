"""Check that all ranks see one run folder, in which each writes its own part of a checkpoint."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from svd_ds.cli import same_kind
from svd_ds.fsync_io import name_errors
from svd_ds.parallel.collectives import (
    SharedError,
    all_gather_objects,
    broadcast_from_rank0,
    raise_on_all_ranks,
)
from svd_ds.parallel.env import Env, host

TOKEN = ".seen-by-all-ranks"
"""Prefix of the names of the token files."""
APPEARS_S = 10.0
"""Seconds that a network file system may take to show a new file on another machine."""
ABANDONED_S = 600.0
"""Age in seconds after which a token file is left over from a killed process."""


def check_shared_folder(folder: Path, env: Env) -> None:
    """Create the run folder, and check that every rank sees the folder of rank 0. All ranks call it.

    Raises:
        SharedError: on all ranks; a rank cannot create the folder or write to it, or sees another folder than
            rank 0. The message names run.dir; if the folders differ, also the ranks, their hosts and paths.
    """
    path = folder.absolute()
    token = path / broadcast_from_rank0(lambda: f"{TOKEN}.{secrets.token_hex(4)}")
    raise_on_all_ranks(lambda: _make(path, token if env.rank == 0 else None))
    first, *_ = locations = all_gather_objects([(str(path), host())])
    # Different paths may still lead to one folder, but are not worth a wait.
    seen = all_gather_objects([_appears(folder / token.name, APPEARS_S if str(path) == first[0] else 0.0)])
    if env.rank == 0:
        _remove(token)
    if all(seen):
        return
    rank = seen.index(False)
    raise SharedError(
        f"run.dir is {first[0]} on rank 0 (host {first[1]}) and {locations[rank][0]} on rank {rank} (host "
        f"{locations[rank][1]}), which are two folders: name one by run.dir=... that all ranks share"
    )


def _make(folder: Path, token: Path | None) -> None:
    """Make the folder, and the token file where one is given."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if token is not None:
            with name_errors(token):
                token.write_text(host(), encoding="utf-8")
    except OSError as error:
        if token is not None:
            with suppress(OSError):
                token.unlink(missing_ok=True)
        raise same_kind(error, f"run.dir={folder} cannot be made or written to: {error}") from error


def _remove(token: Path) -> None:
    """Remove the token file, and those that killed processes have left."""
    with suppress(OSError):
        # The clock of the file system may be that of another machine.
        now = token.stat().st_mtime
        for other in token.parent.glob(f"{TOKEN}.*"):
            if other == token or now - other.stat().st_mtime > ABANDONED_S:
                other.unlink(missing_ok=True)


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True
