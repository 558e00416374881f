"""tools/convert.py --verify: which checkpoints of a run are intact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svd_ds.weights.manifest import COMPLETE
from tests.networks import seal

STEPS = (100, 200, 300)
RANK_FILE = "unet/rank-00001-of-00002.safetensors"
Verify = Callable[..., int]


@pytest.fixture
def verify(run_tool: Callable[..., int]) -> Verify:
    return partial(run_tool, "convert.py", "--verify")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of two ranks."""
    for step in STEPS:
        checkpoint = tmp_path / f"run/checkpoints/step-{step:07d}"
        for folder in ("unet", "ema-power-0.050"):
            (checkpoint / folder).mkdir(parents=True)
            for rank in range(2):
                values = {"a": torch.full((500,), float(step + rank))}
                save_file(values, checkpoint / folder / f"rank-{rank:05d}-of-00002.safetensors")
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}\n')
        seal(checkpoint, world_size=2)
    return tmp_path / "run"


def lines(text: str) -> dict[str, str]:
    """Name of a checkpoint -> its state."""
    return {Path(path).name: state for path, _, state in (line.partition("  ") for line in text.splitlines())}


def test_intact_run_exits_with_0(verify: Verify, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(run) == 0
    assert lines(capsys.readouterr().out) == {f"step-{step:07d}": "intact" for step in STEPS}
    assert verify(run / "checkpoints/step-0000200") == 0, "a checkpoint by itself"
    assert lines(capsys.readouterr().out) == {"step-0000200": "intact"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flipped", f"{RANK_FILE} has another checksum than what was written"),
        ("cut", f"{RANK_FILE} has 100 bytes, and "),
        ("deleted", f"{RANK_FILE} is missing"),
    ],
)
def test_damaged_checkpoint_is_named_with_its_file(
    verify: Verify, run: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    file = run / "checkpoints/step-0000200" / RANK_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[:100])
    assert verify(run) == 2
    out, err = capsys.readouterr()
    found = lines(out)
    assert found["step-0000200"].startswith(f"damaged: {message}")
    assert found["step-0000100"] == found["step-0000300"] == "intact"
    assert f"error: 1 of 3 checkpoints in {run} are damaged: step-0000200" in err and "Traceback" not in err


def test_unfinished_checkpoint_and_one_without_checksums_are_damaged(
    verify: Verify, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-0000100" / COMPLETE).unlink()
    # COMPLETE of an older version, without checksums.
    (run / "checkpoints/step-0000200" / COMPLETE).write_text("5f0c12ab\n")
    assert verify(run) == 2
    out, err = capsys.readouterr()
    found = lines(out)
    assert f"has no file {COMPLETE}" in found["step-0000100"]
    assert "COMPLETE has no checksums: the checkpoint was saved by an older version" in found["step-0000200"]
    assert found["step-0000300"] == "intact"
    assert "2 of 3 checkpoints" in err and "step-0000100, step-0000200" in err


def test_checkpoint_set_aside_is_listed_without_an_error(
    verify: Verify, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-0000300").rename(run / "checkpoints/step-0000300.damaged")
    assert verify(run) == 0
    assert lines(capsys.readouterr().out)["step-0000300.damaged"] == "set aside as damaged, not used"


def test_kept_averages_are_verified_without_the_removed_files(
    verify: Verify, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = run / "averages/step-0000100"
    kept.parent.mkdir()
    (run / "checkpoints/step-0000100").rename(kept)
    shutil.rmtree(kept / "unet")
    assert verify(run) == 0
    assert lines(capsys.readouterr().out)["step-0000100"] == "intact"
    (kept / "ema-power-0.050/rank-00000-of-00002.safetensors").write_bytes(b"")
    assert verify(run) == 2
    assert "damaged: ema-power-0.050/rank-00000" in capsys.readouterr().out


def test_run_without_checkpoints_is_one_sentence(
    verify: Verify, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    for folder, message in (("new", "has no checkpoint"), ("nothing", "does not exist")):
        assert verify(tmp_path / folder) == 2
        err = capsys.readouterr().err
        assert message in err and str(tmp_path / folder) in err and "Traceback" not in err
