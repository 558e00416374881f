"""batch.micro=auto: the largest micro-batch that fits the memory of a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svd_ds.compose import compose
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.env import Env
from svd_ds.plan import auto
from svd_ds.plan.auto import available_memory, choose_micro, resolve_batch
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory import plan_memory
from svd_ds.plan.planner import ProfileFn
from svd_ds.plan.step_profile import StepProfile


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Env:
    """One CPU rank, without a process group."""

    def on_this_rank(action: Callable[[], object]) -> object:
        try:
            return action()
        except ValueError as error:
            raise SharedError(str(error)) from None

    monkeypatch.setattr(auto, "broadcast_from_rank0", on_this_rank)
    return Env(0, 1, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")


def never(*_: object) -> dict[str, StepProfile]:
    raise AssertionError("nothing is planned")


@pytest.mark.parametrize("micro", [3, None])
def test_numbers_are_taken_as_they_are(env: Env, micro: int | None) -> None:
    config = compose(["batch.size=12", f"batch.micro={'null' if micro is None else micro}"])
    assert resolve_batch(config, env, never) == (config.batch, "")


def test_buckets_have_their_own(env: Env) -> None:
    words = ["data.num_frames=14", "data.height=64", "data.width=64", "+data.buckets={14x64x64: 2}"]
    batch, sentence = resolve_batch(compose(["batch.micro=auto", *words]), env, never)
    assert (batch.micro, sentence) == (None, "")


@pytest.mark.parametrize(("gib", "micro"), [(200, 12), (80, 6), (60, 4)])
def test_largest_divisor_that_fits(
    env: Env, profile_fn: ProfileFn, monkeypatch: pytest.MonkeyPatch, gib: int, micro: int
) -> None:
    monkeypatch.setattr(auto, "rank_memory", lambda env: gib * GIB)
    config = compose(["batch.size=12", "batch.micro=auto"])
    batch, sentence = resolve_batch(config, env, profile_fn)
    assert batch == replace(config.batch, micro=micro)
    assert sentence.startswith(f"batch.micro=auto: {micro} of the 12 clips of a rank at once, planned ")
    assert sentence.endswith(f" of {gib:.1f} GiB")


def test_too_little_memory_is_refused(
    env: Env, profile_fn: ProfileFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "rank_memory", lambda env: 9 * GIB)
    with pytest.raises(SharedError, match=r"even 1 clip with recompute=blocks needs .* a rank has 9.0 GiB"):
        resolve_batch(compose(["batch.size=12", "batch.micro=auto"]), env, profile_fn)


def test_one_clip_is_taken_if_its_tensors_fit(make_profile: Callable[..., StepProfile]) -> None:
    config, profile = compose(["batch.size=12"]), make_profile()
    memory = plan_memory(config, profile, 1, 64, 8)
    for capacity, micro in ((memory.total, 1), (memory.allocated, 1), (memory.allocated - 1, None)):
        assert choose_micro(config, profile, 12, 64, 8, capacity, True) == (micro, memory)


def test_gpus_need_the_allowance_and_shards_of_fewer_ranks_are_larger(
    make_profile: Callable[..., StepProfile],
) -> None:
    config, profile = compose(["batch.size=12"]), make_profile()
    found = [choose_micro(config, profile, 12, ranks, 8, 45 * GIB, True)[0] for ranks in (64, 1)]
    assert found == [6, 2]


def test_memory_of_this_machine(tmp_path: Path) -> None:
    assert 2**28 < available_memory() < 2**46
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1024 kB\n")
    assert available_memory(str(tmp_path / "meminfo")) == 2**20
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    with pytest.raises(ValueError, match=r"has no MemAvailable: give batch\.micro as a number"):
        available_memory(str(tmp_path / "meminfo"))


def test_cpu_ranks_share_the_memory(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "available_memory", lambda: 12 * GIB)
    assert auto.rank_memory(replace(env, local_world=3)) == 4 * GIB
