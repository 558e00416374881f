"""Profiles from their own process: with fake CUDA devices, without a C++ compiler, and from the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.compose import compose
from svd_ds.plan import profile
from svd_ds.plan.profile import profile_in_subprocess
from svd_ds.plan.step_profile import PHASES, ProfileRequest, StepProfile
from tests.gpu_path.steps import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def requests() -> list[ProfileRequest]:
    config = compose(["frozen.path=tiny", "data.num_frames=14"]).as_dict()
    return [ProfileRequest(config, policy) for policy in ("none", "blocks")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def exact(requests: list[ProfileRequest], cache: Path) -> list[StepProfile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return profile_in_subprocess(requests)


def test_profile_of_each_request(exact: list[StepProfile]) -> None:
    assert [found.policy for found in exact] == ["none", "blocks"]
    none, blocks = exact
    assert none.exact and none.parameters == none.trained_parameters == blocks.parameters > 1e6
    assert none.device_errors == () and len(none.host_reads) == 1
    assert blocks.peak(4, "backward")[0] < none.peak(4, "backward")[0]
    assert {point.phase for point in none.points} == set(PHASES)
    # The backward pass has twice the products of the forward pass, and recomputation once more.
    forward, backward = (sum(none.phases[phase].flops.values()) for phase in ("forward", "backward"))
    assert backward == pytest.approx(2 * forward, rel=0.1)
    assert sum(blocks.phases["backward"].flops.values()) == pytest.approx(3 * forward, rel=0.1)


def test_profiles_are_cached_with_their_code(
    requests: list[ProfileRequest],
    exact: list[StepProfile],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[ProfileRequest] = []

    def refuse(missing: list[ProfileRequest]) -> list[StepProfile]:
        asked.extend(missing)
        raise RuntimeError("nothing is profiled again")

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(profile, "_run_process", refuse)
    assert profile_in_subprocess(requests) == exact
    monkeypatch.setattr(profile, "_code_digest", lambda: "other code")
    with pytest.raises(RuntimeError, match="again"):
        profile_in_subprocess(requests)
    assert asked == requests


@pytest.mark.slow
def test_without_a_compiler_the_profile_is_nearly_the_same(
    requests: list[ProfileRequest], exact: list[StepProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for rough, fine in zip(profile_in_subprocess(requests), exact, strict=True):
        assert not rough.exact
        for phase in PHASES:
            for clips in (1, 4):
                assert rough.peak(clips, phase)[0] == pytest.approx(fine.peak(clips, phase)[0], rel=0.05)
            rough_flops, fine_flops = (sum(found.phases[phase].flops.values()) for found in (rough, fine))
            assert rough_flops == pytest.approx(fine_flops, rel=0.01)


def test_profile_survives_json(exact: list[StepProfile]) -> None:
    for found in exact:
        assert StepProfile.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_failed_process_is_reported(
    requests: list[ProfileRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'the reason' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(failing))
    with pytest.raises(RuntimeError, match="the step cannot be profiled: the reason"):
        profile_in_subprocess(requests)
