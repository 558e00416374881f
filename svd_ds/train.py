"""The door: `python -m svd_ds.train [+experiment=NAME] [key=value ...]`, one process a rank.

Started by hand (one rank), by torchrun, by srun, or by tools/launch.py. With -m, Hydra runs every
combination.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra

from svd_ds import compose
from svd_ds.allocator import keep_freed_memory
from svd_ds.cli import USER_ERRORS, mask_tracebacks, print_error, wants_traceback
from svd_ds.command_line import CONF, PRIMARY, VERSION_BASE
from svd_ds.credentials import redact
from svd_ds.jobs.rank_session import RankSession
from svd_ds.parallel.env import Env, start_time
from svd_ds.run_folder import RunFolder

HYDRA_SWITCH = "HYDRA_FULL_ERROR"


def main() -> None:
    """Compose, run, and end with 0; with 2 and one sentence on bad input; with 1 when another rank was lost;
    with 130 when interrupted."""
    keep_freed_memory()
    mask_tracebacks()
    debug = wants_traceback()
    compose.register()
    errors: list[Exception] = []
    unnamed: list[str] = []

    try:
        env = Env.read()
    except ValueError as error:
        # Of its place among the ranks each knows for itself.
        print_error(error)
        sys.exit(2)

    @hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name=PRIMARY)
    def task(node: Any) -> None:
        # Those of running it would announce before it raises them: it does not get to see them.
        if not errors:
            try:
                _run(node, env, debug, unnamed)
            except (*compose.COMPOSE_ERRORS, *USER_ERRORS) as error:
                errors.append(error)

    try:
        line = compose.readable([word for word in sys.argv[1:] if word != "--debug"])
        sys.argv[1:] = line.words()
        if line.multirun:
            unnamed += compose.keys_without_folder(line)
        with _hydra_raises():
            task()
        if errors:
            raise errors[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except (*compose.COMPOSE_ERRORS, *USER_ERRORS) as error:
        if debug:
            raise
        # All ranks read the same settings: one tells what is wrong with them.
        if env.rank == 0:
            print_error(compose.explain(error) if isinstance(error, compose.COMPOSE_ERRORS) else error)
        sys.exit(2)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Hydra tells errors of composing in several lines of its own; inside, it raises them, for us to tell."""
    before = os.environ.get(HYDRA_SWITCH)
    os.environ[HYDRA_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[HYDRA_SWITCH]
        else:
            os.environ[HYDRA_SWITCH] = before


def _run(node: Any, env: Env, debug: bool, unnamed: Collection[str]) -> None:
    """Run one config; `unnamed`: keys that differ among the runs of a multirun, but not in run.dir."""
    compose.mask_multirun_file()
    # W&B's client stores them.
    sys.argv[1:] = map(redact, sys.argv[1:])
    settings = compose.to_config(node, cache(lambda: start_time(env)))
    if unnamed:
        # Two runs in one folder would overwrite each other.
        folder = compose.folder_of_job(settings.run.dir, unnamed)
        settings = replace(settings, run=replace(settings.run, dir=folder))
    with RankSession(RunFolder(Path(settings.run.dir)), env, settings.watchdog, debug) as attempt:
        # Assembly imports DeepSpeed, which takes seconds: a mistake in the settings is told before.
        from svd_ds.run import run

        run(settings, env, attempt)


if __name__ == "__main__":
    main()
