"""Planted device bugs: each is found on fake CUDA tensors, with its file and line.

All are planted in one copy of the package: the tracker reports a bug and continues.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_path.steps import ROOT, needs_compiler, run_steps

pytestmark = needs_compiler


@dataclass(frozen=True)
class Bug:
    """A bug: `old` becomes `new` in a file, and is reported where `line` is, as a `kind`."""

    file: str
    old: str
    new: str
    line: str
    """Part of the first line that fails."""
    kind: str = "device_errors"
    where: str = ""
    """File of that line; empty: the same."""


BUGS = {
    "noise drawn on the host": Bug(
        "diffusion/loss.py",
        "[:, None, None, None, None] * noise\n    output",
        '[:, None, None, None, None] * noise.new_empty(noise.shape, device="cpu").normal_()\n    output',
        'noise.new_empty(noise.shape, device="cpu").normal_()',
    ),
    "sinusoid table on the host": Bug(
        "model/layers.py",
        "dtype=torch.float32, device=values.device) / half",
        "dtype=torch.float32) / half",
        "angles = values.float()",
    ),
    "frame numbers on the host": Bug(
        "model/temporal.py",
        "torch.arange(num_frames, device=device)",
        "torch.arange(num_frames)",
        "return self.mlp(sinusoidal_embedding(indices_T",
    ),
    "CLIP's mean and deviation on the host": Bug(
        "model/clip_encoders.py",
        "pixels_BCHW.new_full((1, 1), value)",
        "torch.full((1, 1), value)",
        "/ 2 - mean) / std",
    ),
    "drop rates on the host": Bug(
        "batch.py",
        "signal_names().index(signal)] < rate",
        "signal_names().index(signal)] < torch.full((len(self.drop_BN),), rate)",
        "torch.full((len(self.drop_BN),), rate)",
    ),
    "latents moved to the host": Bug(
        "training/objectives/diffusion.py",
        "return self.autoencoder.scaling_factor * latents_BTChw",
        "return self.autoencoder.scaling_factor * latents_BTChw.cpu()",
        "latents_BTChw.cpu()",
        "host_reads",
    ),
    "loss weight on the host": Bug(
        "diffusion/noise.py",
        "return torch.ones_like(sigma)",
        "return torch.ones(sigma.shape)",
        "self.noise.weight(sigma_B).float() * self.errors",
        where="training/objectives/diffusion.py",
    ),
    "a kernel's scratch on the host": Bug(
        "model/ops/fused_triton.py",
        "x_NSC.new_empty(2, segments, channels, dtype=torch.float32)",
        'x_NSC.new_empty(2, segments, channels, dtype=torch.float32, device="cpu")',
        "statistics[tiling.programs](",
    ),
    "a hidden read by the host": Bug(
        "diffusion/denoiser.py",
        "variance = sigma**2 + 1",
        "variance = sigma**2 + 1 + 0 * float(sigma.max())",
        "float(sigma.max())",
        "host_reads",
    ),
    "a number in host memory": Bug(
        "diffusion/denoiser.py",
        "return 1 / variance, ",
        "return torch.tensor(1.0) / variance, ",
        "return torch.tensor(1.0)",
        "host_operands",
    ),
    "a list of indices": Bug(
        "training/objectives/diffusion.py",
        "first_frame=frames_BTCHW[:, 0],",
        "first_frame=frames_BTCHW[:, [0]][:, 0],",
        "first_frame=frames_BTCHW[:, [0]]",
        "blocking_copies",
    ),
    "indices in host memory": Bug(
        "training/objectives/diffusion.py",
        "last_frame=frames_BTCHW[:, -1],",
        "last_frame=frames_BTCHW.index_select(1, torch.tensor([-1 % frames_BTCHW.shape[1]]))[:, 0],",
        "index_select(1, torch.tensor(",
    ),
    "a table copied to the GPU in every step": Bug(
        "model/unet.py",
        "context = context.to(dtype)\n",
        "context = context.to(dtype) * torch.tensor([1.0], dtype=dtype, device=context.device)\n",
        "torch.tensor([1.0], dtype=dtype, device=context.device)",
        "blocking_copies",
    ),
    "a search for indices": Bug(
        "model/conditioner.py",
        "        context_BLD = self._context(",
        "        first_frame.isnan().nonzero()\n        context_BLD = self._context(",
        "first_frame.isnan().nonzero()",
        "host_reads",
    ),
    "a buffer of the backward pass on the host": Bug(
        "model/ops/attention_triton.py",
        "dqkv = torch.empty_like(qkv)\n        if",
        'dqkv = torch.empty_like(qkv, device="cpu")\n        if',
        "attend_backward[",
    ),
    "a norm in the optimiser's step read by the host": Bug(
        "training/ema.py",
        "weights = [shards[name] for name in self.names]",
        "weights = [shards[name] for name in self.names if shards[name].isfinite().all()]",
        "isfinite().all()",
        "host_reads",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all bugs."""
    root = tmp_path_factory.mktemp("planted")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("svd_ds", "conf"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for bug in BUGS.values():
        file = root / "svd_ds" / bug.file
        text = file.read_text()
        assert text.count(bug.old) == 1, f"{bug.file} has {bug.old!r} {text.count(bug.old)} times"
        file.write_text(text.replace(bug.old, bug.new))
    return root


@pytest.fixture(scope="module")
def seen(copy: Path) -> dict[str, Any]:
    return run_steps(["image/blocks"], copy)["image/blocks"]


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found_with_file_and_line(name: str, copy: Path, seen: dict[str, Any]) -> None:
    bug = BUGS[name]
    file = bug.where or bug.file
    lines = (copy / "svd_ds" / file).read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if bug.line in line]
    assert numbers, f"{file} has no line with {bug.line!r}"
    places = set(re.findall(r"svd_ds/[\w/]+\.py:\d+", " ".join(seen[bug.kind])))
    assert {f"svd_ds/{file}:{number}" for number in numbers} & places, sorted(places)
