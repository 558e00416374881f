"""A folder for Triton's compiled kernels on the disk of this machine.

Triton's default is a folder in the home, which is often a shared file system: many ranks that write there at
once meet stale file handles (PrimeIntellect-ai/prime-rl issue 2305).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from svd_ds.parallel.env import restart_id

VARIABLE = "TRITON_CACHE_DIR"
"""Environment variable that Triton reads when it compiles or loads a kernel."""


def use_local_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set Triton's cache to a folder of this user, and of this Slurm job, in the temporary folder.

    A folder that the user has set stays. A folder of another user is not used, because Triton executes what
    is in it.
    """
    if environ.get(VARIABLE):
        return
    job, _ = restart_id(environ)
    folder = Path(tempfile.gettempdir()) / f"svd_ds-triton-{os.getuid()}{f'-{job}' if job else ''}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="svd_ds-triton-"))
    environ[VARIABLE] = str(folder)
