"""The door: `python -m svd_ds.train [+experiment=NAME] [key=value ...]`, one process a rank.

Started by hand (one rank), by torchrun, by srun, or by tools/launch.py. With -m, Hydra runs every
combination.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra

from svd_ds import config
from svd_ds.door import OF_ANOTHER, USER_ERRORS, print_error, wants_traceback
from svd_ds.parallel.collectives import SharedError, lost_a_rank
from svd_ds.parallel.env import Env

HYDRA_SWITCH = "HYDRA_FULL_ERROR"


def main() -> None:
    """Compose, run, and end with 0; with 2 and one sentence on bad input; with 1 when another rank was lost;
    with 130 when interrupted."""
    show_traceback = wants_traceback()
    sys.argv[1:] = config.debug_last([word for word in sys.argv[1:] if word != "--debug"])
    config.register()
    errors: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="train")
    def task(node: Any) -> None:
        # Those of running it would announce before it raises them: it does not get to see them.
        if not errors:
            try:
                _run(node)
            except (*config.COMPOSE_ERRORS, *USER_ERRORS) as error:
                errors.append(error)

    try:
        with _hydra_raises():
            task()
        if errors:
            raise errors[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except (*config.COMPOSE_ERRORS, *USER_ERRORS) as error:
        if show_traceback:
            raise
        _tell(error)
        sys.exit(2)
    except RuntimeError as error:
        if show_traceback or not lost_a_rank(error):
            raise
        print(f"rank {Env.read().rank} ends, because another rank did", file=sys.stderr)
        sys.exit(OF_ANOTHER)


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


def _run(node: Any) -> None:
    settings = config.to_config(node)
    # Assembly imports DeepSpeed, which takes seconds: a mistake in the settings is told before.
    from svd_ds.run import run

    run(settings, Env.read())


def _tell(error: Exception) -> None:
    """Print one sentence: rank 0 what all ranks know, any rank what only it knows."""
    env = Env.read()
    of_config = isinstance(error, config.COMPOSE_ERRORS)
    shared = of_config or isinstance(error, SharedError)
    if shared and env.rank != 0:
        return
    who = f"rank {env.rank}: " if env.world > 1 and not shared else ""
    print_error(ValueError(config.explain(error)) if of_config else error, who)


if __name__ == "__main__":
    main()
