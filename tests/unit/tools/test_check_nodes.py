"""tools/check_nodes.py: scontrol is a program of the test, and what the nodes find is made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds.jobs import preflight

WITHOUT_NODE2 = ["requeuehold 7", "update JobId=7 ExcNodeList=node2", "release 7"]


@pytest.mark.parametrize(
    ("faults", "state", "code", "asked"),
    [
        ({}, "RUNNING", 0, []),
        ({"node2": "has no disk"}, "RUNNING", 1, WITHOUT_NODE2),
        ({"node2": "has no disk"}, "CANCELLED", 1, []),
    ],
)
def test_a_job_leaves_nodes_that_fail(
    faults: dict[str, str],
    state: str,
    code: int,
    asked: list[str],
    run_tool: Callable[..., int],
    scontrol: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, together = scontrol(state), []

    def failing(*_: object, **options: bool) -> dict[str, str]:
        together.append(options["together"])
        return faults

    monkeypatch.setattr(preflight, "failing_nodes", failing)
    assert run_tool("check_nodes.py", "--job", 7, "--nodes", "node1,node2") == code
    assert log.read_text().splitlines() == asked
    assert together == [False], "they share files alone"
