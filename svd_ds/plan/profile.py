"""Profiles of training steps, made in a process of their own and cached.

    profiles = profile_in_subprocess([ProfileRequest(config.as_dict(), policy) for policy in POLICIES])

The process, `python -m svd_ds.plan.profile`, reads requests as JSON from stdin and writes the profiles to
stdout. It has its own torch, because fake CUDA devices must be there before torch is imported. It uses no
GPU, and a few hundred MB of memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_ds.plan.fake_cuda import NoCompilerError, cache_folder, leave, load
from svd_ds.plan.step_profile import ProfileRequest, StepProfile

if TYPE_CHECKING:
    from svd_ds.plan.fake_step import FakeStep

RELEVANT = ("task", "model", "frozen", "conditioning", "loss", "optim", "ema", "lora")
RELEVANT_DATA = ("num_frames", "height", "width", "latents", "image_share")
"""Settings that a profile depends on; results are cached under their values."""
_PACKAGE = Path(__file__).resolve().parents[1]


def profile_in_subprocess(requests: Sequence[ProfileRequest]) -> list[StepProfile]:
    """Return the profile of each request, from the cache or from one new process.

    Raises:
        RuntimeError: a step cannot be run on fake tensors; the message has the process's last lines.
    """
    code = _code_digest()
    files = [cache_folder() / "profiles" / f"{_key(request, code)}.json" for request in requests]
    found = [_read(file) for file in files]
    missing = [request for request, profile in zip(requests, found, strict=True) if profile is None]
    made = iter(_run_process(missing) if missing else [])
    profiles = []
    for file, profile in zip(files, found, strict=True):
        if profile is None:
            profile = next(made)
            _write(file, profile)
        profiles.append(profile)
    return profiles


def profile_steps(requests: Sequence[ProfileRequest], exact: bool) -> list[StepProfile]:
    """Profile steps in this process, which `prepare` has prepared. Requests of one run share its networks.

    Args:
        exact: False if there are no fake CUDA devices.
    """
    from svd_ds.plan import step_summary

    steps: dict[str, FakeStep] = {}
    profiles = []
    for request in requests:
        profiles.append(step_summary.profile(request, steps, exact))
    return profiles


def prepare(device: str) -> bool:
    """Prepare this process, which must not have imported torch, for `profile_steps`.

    Returns:
        True if fake CUDA devices are there, or are not needed.
    """
    exact = True
    if device == "cuda":
        try:
            load()
        except NoCompilerError as error:
            print(f"without fake CUDA devices, the plan is less exact: {error}", file=sys.stderr)
            exact = False
        from svd_ds.plan.fake_kernels import replace_kernels

        replace_kernels()
    return exact


def main() -> None:
    """Answer the requests on stdin."""
    requests = [ProfileRequest(**fields) for fields in json.load(sys.stdin)]
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        exact = prepare(requests[0].device)
        if not exact:
            from svd_ds.plan.fake_kernels import pretending_cuda

            stack.enter_context(pretending_cuda())
        profiles = profile_steps(requests, exact)
    json.dump([profile.as_dict() for profile in profiles], sys.stdout)
    leave()


def _run_process(requests: Sequence[ProfileRequest]) -> list[StepProfile]:
    assert len({request.device for request in requests}) == 1, "a process has one kind of device"
    done = subprocess.run(
        [sys.executable, "-m", "svd_ds.plan.profile"],
        input=json.dumps([dataclasses.asdict(request) for request in requests]),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"the step cannot be profiled: {done.stderr[-3000:]}")
    return [StepProfile.from_dict(fields) for fields in json.loads(done.stdout)]


def _key(request: ProfileRequest, code: str) -> str:
    config = request.config
    relevant: dict[str, Any] = {name: config[name] for name in RELEVANT}
    relevant["data"] = {name: config["data"][name] for name in RELEVANT_DATA}
    relevant["offload"] = config["parallel"]["offload_optimizer"]
    relevant["request"] = [request.policy, request.precision, request.device, request.clips]
    folder = Path(config["frozen"]["path"])
    relevant["frozen configs"] = [file.read_text() for file in sorted(folder.glob("*/config.json"))]
    return hashlib.sha256(json.dumps([relevant, code], sort_keys=True).encode()).hexdigest()[:32]


def _code_digest() -> str:
    """Hash the code that a profile depends on."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> StepProfile | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return StepProfile.from_dict(json.loads(file.read_text()))
    return None


def _write(file: Path, profile: StepProfile) -> None:
    # A cache: without a place to write it, the next plan takes as long again.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(profile.as_dict()))
        os.replace(draft, file)


if __name__ == "__main__":
    main()
