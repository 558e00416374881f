"""Processes of a test that begin at once: forked from one that has imported all that they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

NEEDED = ("svd_ds.train", "svd_ds.run", "tests.unit.training.test_killed_writer")


def fork_server() -> ForkServerContext:
    """The server of this process of pytest, which has one: whichever test is first decides what it has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(NEEDED))
    return context
