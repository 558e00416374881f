"""ZeRO-3 settings, and the DeepSpeed configuration that is built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svd_ds.settings import Settings, choice, number

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class ZeroConfig(Settings, section="parallel"):
    """Settings of ZeRO stage 3; counts are in elements, not bytes."""

    persistence_threshold: int = number(0, ge=0)
    """Parameters up to this size stay gathered on every rank between steps. With 0 none stays: small
    parameters are gathered with their block, whereas one that stays takes an extra message after every
    step."""
    prefetch_bucket: int = number(50_000_000, ge=0)
    """Elements that are gathered ahead of their use (prefetched)."""
    max_live: int | None = number(None, ge=0)
    """Prefetching pauses while this many elements are gathered. null: twice the largest block, so that one
    block computes while the next is gathered. A rank then holds 201 million of SVD's 1,525 million parameters
    at once; DeepSpeed's default of 1,000 million is most of SVD."""
    max_reuse_distance: int = number(0, ge=0)
    """A gathered parameter is kept if it is used again within this many elements. With 0 a block is gathered
    for its forward pass, and again for its backward pass."""
    reduce_bucket: int = number(50_000_000, ge=1, le=4_000_000_000)
    """Gradients are reduced once this many elements are ready; a buffer of this size is allocated at the
    start."""
    reduce_dtype: str = choice("fp32", PRECISIONS)
    """Data type of the sum of gradients over the ranks; bf16 halves the traffic and rounds each sum."""
    overlap_comm: bool = True
    """Overlap communication with computation (GPUs only)."""
    offload_optimizer: bool = False
    """Keep the master weights and AdamW's moments in host memory, and update them there."""
    fast_host_loops: bool = True
    """Replace what DeepSpeed does in Python for every parameter and rank by one copy a parameter, with the
    same bits: the time of the host then does not grow with the ranks. false: DeepSpeed's own loops."""


def deepspeed_config(zero: ZeroConfig, *, precision: str, gradient_clip: float) -> dict[str, Any]:
    """Build DeepSpeed's configuration (deepspeed.ai/docs/config-json). Engine adds max_live where it is None.

    Args:
        precision: bf16 (compute in bfloat16; master weights and moments in float32) or fp32.
        gradient_clip: largest global gradient norm.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: it must be one of {', '.join(PRECISIONS)}")
    sharding: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        "reduce_bucket_size": zero.reduce_bucket,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        # DeepSpeed would replace torch.nn.functional.linear by its own version, for the whole process.
        "memory_efficient_linear": False,
    }
    if zero.max_live is not None:
        sharding["stage3_max_live_parameters"] = zero.max_live
    if zero.offload_optimizer:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        # DeepSpeed requires both numbers. Engine.backward gets the number of micro-batches of each step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clip,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": zero.reduce_dtype,
        # The optimiser is torch's own AdamW, which DeepSpeed does not list among those it tested.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # It waits for the device in every forward pass and step.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": sharding,
    }
