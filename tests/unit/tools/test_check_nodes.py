"""tools/check_nodes.py with a fake scontrol and fake results of the node checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds.jobs import preflight

WITHOUT_NODE2 = ["requeuehold 7", "update JobId=7 ExcNodeList=node2", "release 7"]


@pytest.mark.parametrize(
    ("faults", "state", "code", "requests"),
    [
        ({}, "RUNNING", 0, []),
        ({"node2": "has no disk"}, "RUNNING", 1, WITHOUT_NODE2),
        ({"node2": "has no disk"}, "CANCELLED", 1, []),
    ],
)
def test_job_is_requeued_without_nodes_that_fail(
    faults: dict[str, str],
    state: str,
    code: int,
    requests: list[str],
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
    assert log.read_text().splitlines() == requests
    assert together == [False], "the nodes of one run are tested separately"
