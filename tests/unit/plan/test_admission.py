"""A job's run is planned on its node's GPU; one that cannot fit is refused, a failed plan is a note."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from svd_ds.compose import compose
from svd_ds.plan.admission import PlannedJob, check_fits, parse_gpu, query_gpu
from svd_ds.plan.hardware import GPUS
from svd_ds.plan.planner import DoesNotFitError, ProfileFn


def put_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpu_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, "for i in 1 2; do echo 'NVIDIA A100-SXM4-80GB, 81920'; done", monkeypatch)
    assert query_gpu() is GPUS["a100-80"]
    put_nvidia_smi(tmp_path, "echo no devices were found >&2; exit 6", monkeypatch)
    with pytest.raises(OSError, match="nvidia-smi: no devices were found"):
        query_gpu()


def test_gpu_that_is_not_in_the_table_has_its_reported_memory() -> None:
    gpu = parse_gpu("NVIDIA B200, 183359")
    assert gpu.name == "NVIDIA B200" and gpu.memory_gib == pytest.approx(179.06, abs=0.01)
    # A slice of a known model.
    assert parse_gpu("NVIDIA A100-SXM4-80GB MIG 3g.40gb, 10000").memory_gib == pytest.approx(9.77, abs=0.01)
    with pytest.raises(ValueError, match="'nonsense', which is not NAME, MEMORY"):
        parse_gpu("nonsense")


def test_run_that_cannot_fit_is_refused_with_what_fits(profile_fn: ProfileFn) -> None:
    gpu = GPUS["a100-80"]
    assert check_fits(compose(["batch.size=16"]), gpu, 16, 8, profile_fn).startswith("plan: ")
    tight = check_fits(compose(["batch.size=224"]), gpu, 16, 8, profile_fn)
    assert tight.startswith("warning: plan: ") and tight.endswith("it may run out of memory")
    with pytest.raises(DoesNotFitError, match=r"it fits with batch\.micro="):
        check_fits(compose(["batch.size=32", "recompute=none"]), gpu, 16, 8, profile_fn)


def test_automatic_micro_batch_that_fits_nowhere_is_refused_with_all_policies(profile_fn: ProfileFn) -> None:
    config = compose(["batch.size=32", "batch.micro=auto", "recompute=none"])
    gpu = replace(GPUS["a100-80"], memory_gib=30.0)
    with pytest.raises(DoesNotFitError, match=r"batch.micro=1 recompute=none .* it fits with batch\.micro=2"):
        check_fits(config, gpu, 16, 8, profile_fn)


def test_failed_plan_is_a_note() -> None:
    def fail() -> str:
        raise RuntimeError("no\ncompiler")

    line = PlannedJob(fail).wait(lambda: False)
    assert line == "note: the run starts without a plan of its memory: no compiler"


def test_refusal_is_raised_where_the_job_waits() -> None:
    def refuse() -> str:
        raise DoesNotFitError("too large")

    with pytest.raises(DoesNotFitError, match="too large"):
        PlannedJob(refuse).wait(lambda: False)


def test_job_that_is_asked_to_end_does_not_wait() -> None:
    release = threading.Event()
    planned = PlannedJob(lambda: str(release.wait(60)))
    assert planned.wait(lambda: True) == ""
    release.set()
    assert planned.wait(lambda: False) == "True"
