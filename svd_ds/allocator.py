"""What a process does with memory that it frees: keeps it."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
LARGE = 32 << 20
"""The most that glibc takes for M_MMAP_THRESHOLD."""
NEVER = -1


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for a training step to find again.

    glibc would give every large tensor back to the system and fault it in anew, page by page, which costs
    steps on a CPU a large share of their time. Where the library is another one, nothing changes.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, NEVER)
