"""The trainer, of which rank 1 has no compiler for Triton's kernels.

broken_kernel_ranks.py compiler OVERRIDE ...    Triton's launch of GEGLU raises an error on rank 1
broken_kernel_ranks.py reports OVERRIDE ...     the trials report as on GPUs, one without a compiler
"""

from __future__ import annotations

import os
import sys
from typing import Any

from svd_ds import train

ERROR = "Failed to find C compiler."


def main() -> None:
    fault, is_broken = sys.argv.pop(1), os.environ["RANK"] == "1"
    if fault == "compiler" and is_broken:
        from svd_ds.model.ops import fused_triton

        def launch(*arguments: Any, **options: Any) -> None:
            raise RuntimeError(ERROR)

        fused_triton._launch_geglu = launch
    if fault == "reports":
        from svd_ds import tasks

        report = dict.fromkeys(("fused", "triton"), ERROR if is_broken else "") | {"sdpa": ""}
        tasks.run_trials = lambda *arguments: report
    train.main()


if __name__ == "__main__":
    main()
