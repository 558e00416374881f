"""Whether all ranks see one run folder: each writes its own part of a checkpoint there."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from svd_ds.parallel.collectives import SharedError, agreed, items_of_ranks, told_by_first
from svd_ds.parallel.env import Env, host

APPEARS_S = 10.0
"""How long a network file system may take to show a new file to another machine."""


def check_shared_folder(folder: Path, env: Env) -> None:
    """Check that every rank's run folder is the one that rank 0 writes to. All ranks call it.

    Raises:
        SharedError: on all ranks; it names run.dir, the ranks, their hosts and their paths.
    """
    path = folder.absolute()
    token = path / told_by_first(lambda: f".seen-by-all-ranks.{secrets.token_hex(4)}")
    agreed(lambda: token.write_text(host()) if env.rank == 0 else 0)
    first, *_ = places = items_of_ranks([(str(path), host())])
    # Where the paths differ they may still lead to one folder: it is only not worth waiting for.
    seen = items_of_ranks([_appears(folder / token.name, APPEARS_S if str(path) == first[0] else 0.0)])
    if env.rank == 0:
        token.unlink(missing_ok=True)
    if all(seen):
        return
    rank = seen.index(False)
    raise SharedError(
        f"run.dir is {first[0]} on rank 0 (host {first[1]}) and {places[rank][0]} on rank {rank} (host "
        f"{places[rank][1]}), which are two folders: name one by run.dir=... that all ranks share"
    )


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True
