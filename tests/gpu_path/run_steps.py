"""Run training steps on fake CUDA tensors, and print as JSON what the tracker saw.

    python tests/gpu_path/run_steps.py CASE[/POLICY] ...      CASES below; all policies of a case, or one

A process of its own: the fake device must be there before torch is imported.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

from svd_ds.plan.fake_cuda import leave

BASE = "frozen.path=tiny data.path=data/shards model.widths=[64] model.attention_levels=[true]"
TWO_LEVELS = "model.widths=[64,64] model.attention_levels=[true,false]"
ALL = ("none", "blocks", "attention", "full")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: (command line, recompute policies)
    "image": (TWO_LEVELS, ALL),
    "text": ("conditioning=text_to_video model.in_channels=4", ALL),
    "decoder": (
        "+experiment=temporal_decoder data.num_frames=4 data.height=32 data.width=32 "
        "loss.perceptual=x.safetensors loss.adversarial_weight=0.1",
        ALL,
    ),
    "lora": ("lora.rank=4 init.from=runs/base", ALL),
    "ends": ("conditioning=interpolation model.in_channels=9 model.masked=true", ("blocks",)),
    "latents": ("data.latents=true data.crop=center data.flip=false", ("blocks",)),
    "offload": ("parallel.offload_optimizer=true ema.on_host=true", ("blocks",)),
    "pseudo3d": ("temporal=make_a_video", ("blocks",)),
    "stills": ("data.image_share=0.5 optim.spatial_lr_scale=0", ("blocks",)),
    "torch": (f"{TWO_LEVELS} model.kernels=torch model.temporal_attention=sdpa", ("blocks",)),
    "full_size": (
        "+experiment=stage3_i2v_xt frozen.path=public init.from=runs/base "
        "model.widths=[320,640,1280,1280] model.attention_levels=[true,true,true,false]",
        ("blocks",),
    ),
}


def run(names: list[str]) -> dict[str, Any]:
    """Run the cases; return case/policy -> what the tracker saw."""
    from svd_ds.plan.profile import prepare

    assert prepare("cuda"), "there is no C++ compiler"
    import torch

    from svd_ds.compose import compose, register
    from svd_ds.plan.fake_step import FakeStep

    register()
    seen = {}
    for argument in names:
        name, _, wanted = argument.partition("/")
        words, policies = CASES[name]
        config = compose([*(["frozen.path=tiny", "data.path=data/shards"]), *words.split()])
        precision = "fp32" if config.task == "decoder" else "bf16"
        step = FakeStep(config, torch.device("cuda", 0), precision)
        for policy in [wanted] if wanted else policies:
            found = step.run(policy)
            tracker = found.tracker
            seen[f"{name}/{policy}"] = {
                "device_errors": tracker.device_errors,
                "host_reads": tracker.host_reads,
                "blocking_copies": tracker.blocking_copies,
                "host_operands": tracker.host_operands,
                "launches": dict(tracker.launches),
                "kept": sum(tracker.storages[index].size for index in found.kept),
            }
    return seen


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        result = run(sys.argv[1:])
    print(json.dumps(result))
    leave()
