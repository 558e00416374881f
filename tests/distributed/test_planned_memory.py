"""The planner's memory against what torch's allocator held on the ranks of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.compose import compose
from svd_ds.plan.memory import plan_memory
from svd_ds.plan.requests import profile_cpu_steps
from tests.distributed.conftest import RunRanks

NUM_RANKS = 2
SETTINGS = (
    "data.num_frames=8", "data.height=64", "data.width=80", "data.num_workers=0", "batch.size=8",
    "run.steps=4", "precision=fp32", "evaluation.every=0", "sampling.every=1000000", "sampling.num_videos=1",
    "sampling.num_steps=1", "checkpoint.every=1000", "logger.wandb=disabled",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("settings", "phase"),
    [
        # A bucket in proportion to the network, as at full size: the plan counts its copy during all of the
        # backward pass, and this peak is at its beginning.
        (("recompute=none", "parallel.reduce_bucket=500000"), "backward"),
        (("recompute=blocks", "parallel.reduce_bucket=2000000", "ema.lengths=[0.1]"), "encoders"),
        (("recompute=blocks", "frozen.chunk=1"), "backward"),
    ],
)
def test_plan_is_what_the_allocator_of_each_rank_held(
    settings: tuple[str, ...], phase: str, run_ranks: RunRanks, shards: Path, tmp_path: Path
) -> None:
    words = (*SETTINGS, *settings, f"data.path={shards}", f"run.dir={tmp_path / 'run'}")
    script = Path(__file__).parent / "measured_memory.py"
    ended = run_ranks(script, tmp_path, *words, num_ranks=NUM_RANKS, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    config = compose(words)
    profile = profile_cpu_steps(config, [config.recompute], config.data.shape)[config.recompute]
    micro = config.batch.size // NUM_RANKS
    memory = plan_memory(config, profile, micro, NUM_RANKS, NUM_RANKS, on_gpu=False)
    assert memory.where.startswith(phase)
    for rank in range(NUM_RANKS):
        measured = int((tmp_path / str(rank)).read_text())
        assert measured == pytest.approx(memory.allocated, rel=0.05), memory.parts
