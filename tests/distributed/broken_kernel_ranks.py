"""The trainer, of which rank 1 has no compiler for Triton's kernels.

broken_kernel_ranks.py OVERRIDE ...
"""

from __future__ import annotations

import os
from typing import Any

from svd_ds import train


def main() -> None:
    if os.environ["RANK"] == "1":
        from svd_ds.model.ops import fused_triton

        def launch(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("Failed to find C compiler.")

        fused_triton._launch_geglu = launch
    train.main()


if __name__ == "__main__":
    main()
