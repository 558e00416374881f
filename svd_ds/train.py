"""The training command: `python -m svd_ds.train [+experiment=NAME] [key=value ...]`, one process a rank.

Start it by hand (one rank), with torchrun, with srun, or with tools/launch.py. With -m Hydra runs every
combination of several values. `--help KEY` explains a setting.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra

from svd_ds import compose
from svd_ds.cli import USER_ERRORS, keep_freed_memory, mask_tracebacks, print_error, wants_traceback
from svd_ds.command_line import CONF, PRIMARY, VERSION_BASE
from svd_ds.credentials import redact
from svd_ds.jobs.out_of_memory import LEAST_MEMORY
from svd_ds.jobs.rank_session import RankSession
from svd_ds.parallel.env import Env, start_time
from svd_ds.parallel.gpu_settings import configure_allocator
from svd_ds.run_folder import RunFolder

HYDRA_SWITCH = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run the command.

    Exit codes: 0 when the run has finished, or has stopped on request with a checkpoint; 1 when another rank
    has failed; 2, with one sentence, on bad input; 130 when interrupted.
    """
    keep_freed_memory()
    configure_allocator()
    mask_tracebacks()
    debug = wants_traceback()
    if names := help_names(sys.argv[1:]):
        _print_help(names)
        return
    compose.register()
    errors: list[Exception] = []
    folder_keys: list[str] = []

    try:
        env = Env.read()
    except ValueError as error:
        # Launcher errors are per rank: every rank prints its own.
        print_error(error)
        sys.exit(2)

    @hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name=PRIMARY)
    def task(node: Any) -> None:
        # Hydra would print errors of the run in its own format, so they do not reach it.
        if not errors:
            try:
                _run(node, env, debug, folder_keys)
            except (*compose.COMPOSE_ERRORS, *USER_ERRORS) as error:
                errors.append(error)

    try:
        line = compose.parse_command_line([word for word in sys.argv[1:] if word != "--debug"])
        sys.argv[1:] = line.words()
        if line.multirun:
            folder_keys += compose.keys_for_folder(line)
        with _hydra_raises():
            task()
        if errors:
            raise errors[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except (*compose.COMPOSE_ERRORS, *USER_ERRORS) as error:
        if debug:
            raise
        # All ranks read the same settings, so only rank 0 reports errors in them.
        if env.rank == 0:
            print_error(compose.explain(error) if isinstance(error, compose.COMPOSE_ERRORS) else error)
        sys.exit(2)


def help_names(words: Sequence[str]) -> list[str]:
    """Return the keys and groups that `--help` is asked to explain; empty if Hydra's own help is wanted."""
    if not {"--help", "-h"} & set(words):
        return []
    return [word for word in words if not word.startswith("-") and "=" not in word]


def _print_help(names: Sequence[str]) -> None:
    from svd_ds.config_reference import help_text

    try:
        print("\n\n".join(map(help_text, names)))
    except ValueError as error:
        print_error(error)
        sys.exit(2)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise errors of the composition, which we report in one line; otherwise it prints
    several."""
    before = os.environ.get(HYDRA_SWITCH)
    os.environ[HYDRA_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[HYDRA_SWITCH]
        else:
            os.environ[HYDRA_SWITCH] = before


def _run(node: Any, env: Env, debug: bool, folder_keys: Collection[str]) -> None:
    """Run one config.

    Args:
        folder_keys: keys whose values are added to run.dir (`compose.keys_for_folder`).
    """
    compose.mask_multirun_file()
    # W&B's client stores the arguments.
    sys.argv[1:] = map(redact, sys.argv[1:])
    settings = compose.to_config(node, cache(lambda: start_time(env)))
    if folder_keys:
        # Two runs in one folder would overwrite each other.
        folder = compose.multirun_folder(settings.run.dir, folder_keys)
        settings = replace(settings, run=replace(settings.run, dir=folder))
    memory = {key: attrgetter(key)(settings) for key in LEAST_MEMORY}
    with RankSession(RunFolder(Path(settings.run.dir)), env, settings.watchdog, debug, memory) as session:
        # DeepSpeed takes seconds to import: mistakes in the settings are reported before that.
        from svd_ds.run import run

        run(settings, env, session)


if __name__ == "__main__":
    main()
