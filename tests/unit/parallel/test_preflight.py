"""Who is to blame when nodes do not answer, cannot compute, or do not meet."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from svd_ds.parallel.preflight import FIT, check_alone, failing_nodes


@dataclass
class FakeJob:
    """Nodes of which some are ill, some silent, and some do not reach the others."""

    nodes: tuple[str, ...]
    ill: Sequence[str] = ()
    silent: Sequence[str] = ()
    apart: Sequence[str] = ()
    gpus: int = 0
    groups: list[list[str]] = field(default_factory=list)

    def step(self, command: Sequence[str], *options: str, **variables: str) -> subprocess.Popen[bytes]:
        group = next(option for option in options if "nodelist" in option).partition("=")[2].split(",")
        assert variables["MASTER_ADDR"] == group[0]
        self.groups.append(group)
        check, notes = command[3], Path(command[5])
        assert ("--kill-on-bad-exit=0" in options) == (check == "alone")
        meets = not set(group) & set(self.apart)
        for node in set(group) - set(self.silent):
            well = node not in self.ill if check == "alone" else meets
            (notes / node).write_text(FIT if well else "has no disk")
        return subprocess.Popen(["true"])


def nodes(count: int) -> tuple[str, ...]:
    return tuple(f"n{i}" for i in range(count))


def test_fit_nodes_have_no_fault(tmp_path: Path) -> None:
    job = FakeJob(nodes(4))
    assert failing_nodes(job, tmp_path) == {}
    assert job.groups == [["n0", "n1", "n2", "n3"]] * 2, "alone, and together"


def test_a_node_that_is_ill_or_silent_is_named_with_its_fault(tmp_path: Path) -> None:
    faults = failing_nodes(FakeJob(nodes(4), ill=["n2"], silent=["n1"]), tmp_path)
    assert set(faults) == {"n1", "n2"}
    assert faults["n2"] == "has no disk"
    assert "does not answer" in faults["n1"]


@pytest.mark.parametrize(
    ("count", "apart", "blamed"),
    [
        (2, ["n1"], {"n1"}),
        (2, ["n0"], {"n1"}),  # they cannot be told apart, and n0 runs the job script
        (3, ["n0"], {"n0"}),
        (5, ["n4"], {"n4"}),
        (6, ["n2", "n3"], {"n2", "n3"}),
    ],
)
def test_a_node_that_reaches_nobody_is_named(
    tmp_path: Path, count: int, apart: list[str], blamed: set[str]
) -> None:
    job = FakeJob(nodes(count), apart=apart)
    assert set(failing_nodes(job, tmp_path)) == blamed
    assert all(len(group) == 2 for group in job.groups[2:])


def test_a_fit_machine_passes_and_a_missing_gpu_or_disk_is_told(tmp_path: Path) -> None:
    check_alone(tmp_path, gpus=0)
    with pytest.raises(OSError, match="GPUs of its 1000"):
        check_alone(tmp_path, gpus=1000)
    with pytest.raises(OSError, match="nowhere"):
        check_alone(tmp_path / "nowhere", gpus=0)
