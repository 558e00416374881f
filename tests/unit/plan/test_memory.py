"""Peak memory: shards, buffers, and the step's own tensors; what offloading moves to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from svd_ds.compose import compose
from svd_ds.config import RunConfig
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory import plan_memory
from svd_ds.plan.step_profile import StepProfile

RANKS, PER_NODE = 16, 8
SHARD = 1_000_000_000 // RANKS
MakeProfile = Callable[..., StepProfile]


@pytest.fixture
def config() -> RunConfig:
    """Two averages."""
    return compose(["ema.lengths=[0.05,0.1]"])


def test_shards_have_26_bytes_a_parameter(config: RunConfig, make_profile: MakeProfile) -> None:
    parts = plan_memory(config, make_profile(), 1, RANKS, PER_NODE).parts
    shards = {"bf16 weights": 2, "fp32 master weights": 4, "Adam's moments": 8, "fp32 gradients": 4}
    shards["averages (2)"] = 8
    assert {name: parts[name] for name in shards} == {name: n * SHARD for name, n in shards.items()}


def test_parts_sum_to_the_peak_of_the_allocator(config: RunConfig, make_profile: MakeProfile) -> None:
    memory = plan_memory(config, make_profile(), 3, RANKS, PER_NODE)
    assert memory.allocated == sum(memory.parts.values())
    assert memory.parts["kept"] == 3 * 4 * GIB == memory.kept
    assert memory.parts["activations"] == GIB + 3 * GIB
    assert memory.where == "backward: block a"
    assert memory.total == memory.allocated + sum(memory.allowance.values())


def test_peak_is_in_the_encoder_while_clips_are_few(config: RunConfig, make_profile: MakeProfile) -> None:
    memory = plan_memory(config, make_profile(), 1, RANKS, PER_NODE)
    assert memory.where == "encoders: vae" and memory.parts["activations"] == 7 * GIB
    # A smaller chunk of frames moves the peak to the network.
    memory = plan_memory(config, make_profile(chunk=2), 1, RANKS, PER_NODE)
    assert memory.where == "backward: block a"


def test_buffers_follow_the_settings(config: RunConfig, make_profile: MakeProfile) -> None:
    parts = plan_memory(config, make_profile(), 3, RANKS, PER_NODE).parts
    assert parts["prefetched block"] == 2 * 2 * 50_000_000, "the bucket is smaller than the largest block"
    assert parts["reduce bucket"] == parts["reduced gradients"] == 4 * 50_000_000
    zero = replace(
        config.parallel, prefetch_bucket=200_000_000, reduce_bucket=10_000_000, reduce_dtype="bf16"
    )
    parts = plan_memory(replace(config, parallel=zero), make_profile(), 3, RANKS, PER_NODE).parts
    assert parts["prefetched block"] == 2 * 2 * 100_000_000
    assert parts["reduce bucket"] == parts["reduced gradients"] == 2 * 10_000_000


def test_encoders_run_while_only_the_bucket_is_there(config: RunConfig, make_profile: MakeProfile) -> None:
    memory = plan_memory(config, make_profile(), 1, RANKS, PER_NODE)
    assert memory.where == "encoders: vae" and "reduce bucket" in memory.parts
    assert not {"prefetched block", "reduced gradients"} & memory.parts.keys()


def test_few_trained_parameters_fill_no_bucket(config: RunConfig, make_profile: MakeProfile) -> None:
    profile = make_profile(trained_parameters=1_000_000)
    assert plan_memory(config, profile, 3, RANKS, PER_NODE).parts["reduced gradients"] == 4_000_000


def test_offloading_moves_the_states_to_the_host(config: RunConfig, make_profile: MakeProfile) -> None:
    offloaded = replace(config, parallel=replace(config.parallel, offload_optimizer=True))
    before = plan_memory(config, make_profile(), 1, RANKS, PER_NODE)
    memory = plan_memory(offloaded, make_profile(), 1, RANKS, PER_NODE)
    assert before.allocated - memory.allocated == 24 * SHARD and "bf16 weights" in memory.parts
    # The gradients are twice in host memory: accumulated, and for the optimiser.
    assert sum(memory.host.values()) == PER_NODE * 28 * SHARD and not before.host


def test_averages_may_be_in_host_memory(config: RunConfig, make_profile: MakeProfile) -> None:
    on_host = replace(config, ema=replace(config.ema, on_host=True))
    memory = plan_memory(on_host, make_profile(), 1, RANKS, PER_NODE)
    assert memory.host == {"averages (2)": PER_NODE * 8 * SHARD} and "averages (2)" not in memory.parts


def test_frozen_parameters_have_weights_alone(config: RunConfig, make_profile: MakeProfile) -> None:
    parts = plan_memory(config, make_profile(trained_parameters=16_000), 1, RANKS, PER_NODE).parts
    assert parts["bf16 weights"] == 2 * SHARD and parts["Adam's moments"] == 8 * 1000


def test_fp32_has_weights_and_masters(config: RunConfig, make_profile: MakeProfile) -> None:
    parts = plan_memory(config, make_profile(compute_bytes=4), 1, RANKS, PER_NODE).parts
    assert parts["fp32 weights"] == parts["fp32 master weights"] == 4 * SHARD


def test_discriminator_counts_whole_on_every_rank(config: RunConfig, make_profile: MakeProfile) -> None:
    assert plan_memory(config, make_profile(extra_bytes=5), 1, RANKS, PER_NODE).parts["discriminator"] == 5


def test_a_rank_on_a_cpu_has_no_cuda_and_no_host(config: RunConfig, make_profile: MakeProfile) -> None:
    offloaded = replace(config, parallel=replace(config.parallel, offload_optimizer=True))
    memory = plan_memory(offloaded, make_profile(), 1, 1, 1, on_gpu=False)
    assert not memory.host and set(memory.allowance) == {"process", "fragmentation"}
    assert memory.parts["Adam's moments"] == 8_000_000_000


def test_allowance_of_the_full_network_is_5_to_8_gib(config: RunConfig, make_profile: MakeProfile) -> None:
    svd = make_profile(parameters=1_524_623_082)
    assert 5 * GIB < sum(plan_memory(config, svd, 1, 64, 8).allowance.values()) < 8 * GIB
    alone = plan_memory(config, svd, 1, 1, 1).allowance
    assert alone["NCCL"] == alone["weights gathered ahead"] == 0, "one rank gathers nothing"
