"""The DeepSpeed configuration that is made of the settings."""

from __future__ import annotations

from dataclasses import fields

import pytest

from svd_ds.parallel.zero import ZeroConfig, deepspeed_config


def test_default_deepspeed_configuration() -> None:
    config = deepspeed_config(ZeroConfig(), precision="bf16", gradient_clip=1.0)
    assert config == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 50_000_000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "memory_efficient_linear": False,
        },
    }


def test_every_field_has_its_effect() -> None:
    common = {"precision": "fp32", "gradient_clip": 0.5}
    plain = deepspeed_config(ZeroConfig(), **common)
    assert plain["bf16"] == {"enabled": False}
    assert plain["gradient_clipping"] == 0.5
    changes = (
        ZeroConfig(persistence_threshold=7),
        ZeroConfig(prefetch_bucket=7),
        ZeroConfig(max_live=7),
        ZeroConfig(max_reuse_distance=7),
        ZeroConfig(reduce_bucket=7),
        ZeroConfig(reduce_dtype="bf16"),
        ZeroConfig(overlap_comm=False),
        ZeroConfig(offload_optimizer=True),
    )
    # The engine reads fast_host_loops; DeepSpeed does not know it.
    names = [field.name for field in fields(ZeroConfig) if field.name != "fast_host_loops"]
    assert {n for c in changes for n in names if getattr(c, n) != getattr(ZeroConfig(), n)} == set(names)
    for changed in changes:
        assert deepspeed_config(changed, **common) != plain, changed


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        deepspeed_config(ZeroConfig(), precision="fp16", gradient_clip=1.0)
    with pytest.raises(ValueError, match=r"parallel.reduce_dtype is 'fp16'"):
        ZeroConfig(reduce_dtype="fp16")
    with pytest.raises(ValueError, match=r"parallel.reduce_bucket is 0"):
        ZeroConfig(reduce_bucket=0)
