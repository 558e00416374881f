"""Nodes to blame when some do not answer, cannot compute, or do not meet."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from svd_ds.jobs import preflight
from svd_ds.jobs.node_checks import UNREACHABLE_NAME, TaskResult
from svd_ds.jobs.preflight import describe_bandwidth, failing_nodes, slow_rails
from svd_ds.model.ops.trial import KernelSettings
from svd_ds.parallel.devices import UNUSABLE


@dataclass
class FakeJob:
    """A job in which some nodes fail alone (ill), some do not answer (silent), some do not reach the others
    (apart), no more than two meet at once (crowded), or some have a slow GPU (bandwidths)."""

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
    distance: str = "timed out"
    """Fault of nodes that do not meet."""
    bandwidths: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Node -> GB/s of its GPUs, where they are not 20."""
    kernel_faults: Mapping[str, dict[str, str]] = field(default_factory=dict)
    """Node -> kernels that cannot be used there, and why; known only to a check that tries kernels."""
    id: str = "7"

    def requeue(self, exclude: Sequence[str] = ()) -> None:
        raise AssertionError("failing_nodes must not requeue the job")

    def start_step(self, command: Sequence[str], *options: str, **variables: str) -> subprocess.Popen[bytes]:
        group = next(option for option in options if "nodelist" in option).partition("=")[2].split(",")
        assert variables["MASTER_ADDR"] == group[0]
        self.groups.append(group)
        self.options += options
        check, notes = command[3], Path(command[5])
        assert "--kill-on-bad-exit=0" in options, "a node that fails must not end the others' check"
        num_tasks = max(self.gpus, 1) if check == "together" else 1
        assert {f"--ntasks={num_tasks * len(group)}", f"--ntasks-per-node={num_tasks}"} <= set(options)
        meets = not set(group) & set(self.apart) and not (self.crowded and len(group) > 2)
        for node in set(group) - set(self.silent):
            for task in range(num_tasks):
                if check == "alone":
                    found = self.kernel_faults.get(node, {}) if "--kernels" in command else {}
                    result = TaskResult(self.illness if node in self.ill else None, kernel_faults=found)
                elif meets:
                    result = TaskResult(None, self.bandwidths.get(node, [20.0] * num_tasks)[task])
                else:
                    result = TaskResult(self.distance)
                result.write(notes / node / str(task))
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


def test_nodes_whose_kernels_fail_are_named_in_one_line_a_fault_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = KernelSettings("auto", {"model.spatial_attention": "flash_attn"}, 64)
    triton = {"Triton's group norm": "no C compiler", "Triton's attention": "no C compiler"}
    job = FakeJob(nodes(4), kernel_faults={"n1": triton, "n3": triton | {"flash_attn": "wrong numbers"}})
    assert failing_nodes(job, tmp_path, together=False, kernels=kernels) == {}
    assert capsys.readouterr().out.splitlines() == [
        "warning: Triton's group norm and Triton's attention cannot be used on n1, n3: no C compiler",
        "warning: flash_attn cannot be used on n3: wrong numbers",
    ]
    assert failing_nodes(job, tmp_path, together=False) == {}
    assert capsys.readouterr().out == "", "a job without a network tries no kernels"


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
    job = FakeJob(
        nodes(1), silent=nodes(1), command=["install", "-D", "/dev/null", f"{tmp_path}/logs/preflight/n0/0"]
    )
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
    assert notes and all("does not answer" in (note.fault or "") for note in notes.values())


def test_name_that_no_other_node_reaches_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    fault = f"{UNREACHABLE_NAME}: it is 127.0.1.1; set GLOO_SOCKET_IFNAME"
    job = FakeJob(nodes(3), apart=nodes(3), distance=fault)
    with pytest.raises(
        ValueError, match=r"^n0 has a name .*GLOO_SOCKET_IFNAME; so do all 3 nodes of the job"
    ):
        failing_nodes(job, tmp_path)
    assert len(job.groups) == 2, "no pair is tried"


def test_together_each_gpu_is_a_rank_whatever_the_cpus_of_the_job(tmp_path: Path) -> None:
    job = FakeJob(nodes(2), gpus=8)
    assert failing_nodes(job, tmp_path) == {}
    assert {"--ntasks-per-node=8", "--ntasks=16", "--cpus-per-task=1", "--overcommit"} <= set(job.options)


RAILS = {"n0": [20.0, 21.0], "n1": [20.0, 5.0], "n2": [20.0, 22.0]}


def test_bandwidth_is_printed_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing_nodes(FakeJob(nodes(3)), tmp_path)
    line = capsys.readouterr().out
    assert line == describe_bandwidth({node: [20.0] for node in nodes(3)}) + "\n"
    assert describe_bandwidth(RAILS) == (
        "bandwidth between nodes, in each direction: 41 GB/s a node and 20 GB/s a rank (medians); "
        "least 5 GB/s, rank 1 of n1"
    )


def test_gpu_with_less_than_half_of_the_others_bandwidth_is_slow() -> None:
    assert slow_rails(RAILS) == {
        "n1": "has a slow network: GPU 1 reaches 5 GB/s to another node, the median of the others is 20 GB/s"
    }
    assert slow_rails(RAILS | {"n1": [20.0, 10.1]}) == {}


@pytest.mark.parametrize(
    ("slow", "count", "gpus", "restarts", "excluded", "warned"),
    [
        (["n1"], 3, 2, 0, {"n1"}, set()),
        (["n1"], 3, 2, 1, set(), {"n1"}),  # a slow run is better than none
        (["n1"], 2, 2, 0, set(), {"n1"}),  # either may be to blame
        (["n0", "n1"], 4, 2, 0, set(), {"n0", "n1"}),  # half of them: the network itself
        (["n1"], 3, 0, 0, set(), set()),  # CPUs share their cores with others
    ],
)
def test_few_nodes_with_a_slow_gpu_are_excluded_at_the_first_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slow: list[str],
    count: int,
    gpus: int,
    restarts: int,
    excluded: set[str],
    warned: set[str],
) -> None:
    monkeypatch.setattr(preflight, "restart_id", lambda: (7, restarts))
    slow_gpus = [20.0] * (gpus - 1) + [2.0]
    job = FakeJob(nodes(count), gpus=gpus, bandwidths=dict.fromkeys(slow, slow_gpus))
    assert set(failing_nodes(job, tmp_path)) == excluded
    assert set(re.findall(r"warning: (n\d) has a slow network", capsys.readouterr().out)) == warned
