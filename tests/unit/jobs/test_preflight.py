"""Nodes to blame when some do not answer, cannot compute, or do not meet."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from svd_ds.jobs import preflight
from svd_ds.jobs.preflight import FIT, check_node, failing_nodes
from svd_ds.parallel.devices import UNUSABLE
from svd_ds.parallel.env import host


@dataclass
class FakeJob:
    """A job in which some nodes fail alone (ill), some do not answer (silent), some do not reach the others
    (apart), or no more than two meet at once (crowded)."""

    nodes: tuple[str, ...]
    ill: Sequence[str] = ()
    silent: Sequence[str] = ()
    apart: Sequence[str] = ()
    crowded: bool = False
    command: Sequence[str] = ("true",)
    """Command of a step."""
    gpus: int = 0
    groups: list[list[str]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    """Options of the steps."""
    illness: str = "has no disk"
    id: str = "7"

    def requeue(self, exclude: Sequence[str] = ()) -> None:
        raise AssertionError("failing_nodes must not requeue the job")

    def start_step(self, command: Sequence[str], *options: str, **variables: str) -> subprocess.Popen[bytes]:
        group = next(option for option in options if "nodelist" in option).partition("=")[2].split(",")
        assert variables["MASTER_ADDR"] == group[0]
        self.groups.append(group)
        self.options += options
        check, notes = command[3], Path(command[5])
        assert ("--kill-on-bad-exit=0" in options) == (check == "alone")
        meets = not set(group) & set(self.apart) and not (self.crowded and len(group) > 2)
        for node in set(group) - set(self.silent):
            well = node not in self.ill if check == "alone" else meets
            (notes / node).write_text(FIT if well else self.illness)
        return subprocess.Popen(self.command)


def nodes(count: int) -> tuple[str, ...]:
    return tuple(f"n{i}" for i in range(count))


def test_healthy_nodes_have_no_fault(tmp_path: Path) -> None:
    job = FakeJob(nodes(4))
    assert failing_nodes(job, tmp_path) == {}
    assert job.groups == [["n0", "n1", "n2", "n3"]] * 2, "alone, and together"


def test_nodes_are_checked_only_alone_if_together_is_false(tmp_path: Path) -> None:
    job = FakeJob(nodes(3), apart=["n1"])
    assert failing_nodes(job, tmp_path, together=False) == {} and len(job.groups) == 1


def test_node_that_fails_or_is_silent_is_named_with_its_fault(tmp_path: Path) -> None:
    faults = failing_nodes(FakeJob(nodes(4), ill=["n2"], silent=["n1"]), tmp_path)
    assert set(faults) == {"n1", "n2"}
    assert faults["n2"] == "has no disk"
    assert "does not answer" in faults["n1"]


WITHOUT_CUDA = f"{UNUSABLE}: torch 2.13.0 is built without CUDA"
OLD_DRIVER = f"{UNUSABLE}: The NVIDIA driver on your system is too old (found version 11040)"
NO_DRIVER = f"{UNUSABLE}: Found no NVIDIA driver on your system"


@pytest.mark.parametrize(
    ("illness", "count", "ill", "refused"),
    [
        (WITHOUT_CUDA, 1, ["n0"], True),
        (WITHOUT_CUDA, 3, ["n0", "n1", "n2"], True),
        (OLD_DRIVER, 1, ["n0"], True),
        (OLD_DRIVER, 3, ["n1"], False),
        (NO_DRIVER, 1, ["n0"], False),
        (NO_DRIVER, 3, ["n0", "n1", "n2"], True),
        (NO_DRIVER, 3, ["n0", "n2"], False),
        ("sees 7 GPUs of its 8", 3, ["n0", "n1", "n2"], False),
    ],
)
def test_torch_that_cannot_use_the_gpus_of_any_node_is_a_mistake_of_the_user(
    tmp_path: Path, illness: str, count: int, ill: list[str], refused: bool
) -> None:
    job = FakeJob(nodes(count), ill=ill, illness=illness)
    if not refused:
        assert failing_nodes(job, tmp_path) == dict.fromkeys(ill, illness)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(illness)}.*n{count - 1}"):
        failing_nodes(job, tmp_path)


def test_gpu_of_a_node_that_torch_cannot_use_is_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError(WITHOUT_CUDA)

    monkeypatch.setattr(preflight, "check_gpus_are_usable", fail)
    monkeypatch.setattr(sys, "argv", ["preflight", "alone", str(tmp_path), str(tmp_path), "--gpus", "8"])
    with pytest.raises(SystemExit) as ended:
        preflight.main()
    assert ended.value.code == 1
    assert (tmp_path / host()).read_text() == WITHOUT_CUDA


@pytest.mark.parametrize(
    ("count", "apart", "blamed"),
    [
        (2, ["n1"], {"n1"}),
        (2, ["n0"], {"n1"}),  # either may be to blame, and n0 runs the job script
        (3, ["n0"], {"n0"}),
        (5, ["n4"], {"n4"}),
        (6, ["n2", "n3"], {"n2", "n3"}),
    ],
)
def test_node_that_reaches_no_other_is_named(
    tmp_path: Path, count: int, apart: list[str], blamed: set[str]
) -> None:
    job = FakeJob(nodes(count), apart=apart)
    assert set(failing_nodes(job, tmp_path)) == blamed
    num_pairs = 0 if count == 2 else count
    assert [len(group) for group in job.groups] == [count, count, *[2] * num_pairs], "alone, together, ring"


def test_nodes_that_meet_only_in_pairs_are_all_named(tmp_path: Path) -> None:
    faults = failing_nodes(FakeJob(nodes(5), crowded=True), tmp_path)
    assert list(faults) == list(nodes(5)), "none is to blame"


def test_percent_sign_in_the_folder_is_no_pattern_of_srun(tmp_path: Path) -> None:
    job = FakeJob(nodes(1))
    folder = tmp_path / "100%j"
    assert failing_nodes(job, folder) == {}
    assert f"--error={tmp_path}/100%%j/logs/preflight.log" in job.options


def test_empty_result_of_a_node_on_a_full_disk_is_no_answer(tmp_path: Path) -> None:
    job = FakeJob(nodes(1), silent=nodes(1), command=["touch", f"{tmp_path}/logs/preflight/n0"])
    assert "does not answer" in failing_nodes(job, tmp_path)["n0"]


def test_steps_that_hang_share_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CHECK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(preflight, "KILL_AFTER_S", 0.5)
    job = FakeJob(
        nodes(9), silent=nodes(9), command=["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
    )
    started = time.monotonic()
    pairs = [[f"n{i}", f"n{i + 1}"] for i in range(0, 8, 2)]
    notes = preflight._run_check(job, "together", pairs, tmp_path)
    assert time.monotonic() - started < 2.5, "one limit and one grace for all of them"
    assert notes and all("does not answer" in note for note in notes.values())


def test_healthy_machine_passes_and_missing_gpu_or_disk_is_an_error(tmp_path: Path) -> None:
    check_node(tmp_path, gpus=0)
    with pytest.raises(OSError, match="GPUs of its 1000"):
        check_node(tmp_path, gpus=1000)
    with pytest.raises(OSError, match="nowhere"):
        check_node(tmp_path / "nowhere", gpus=0)
