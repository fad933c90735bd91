"""What malloc does with memory that is freed.

A step of training frees the same large tensors every time. glibc gives them back to the system at once, those of 32 MB
and more and whatever lies at the top of its heap, and the system hands out the next step's pages one by one, cleared:
a tenth of a small model's step on a CPU (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_TO = 2**30
"""Bytes: larger blocks are still given back, for in the heap small ones could cut them up."""
_MOST_OF_OLD_RELEASES = 2**25
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep freed blocks of up to 1 GiB for the main thread's next ones, from here on.

    Older releases take 32 MiB at most. What other threads allocate is mapped anew as before: their heaps are small.

    Returns:
        Whether it does so: not where the environment sets these thresholds, nor with another C library.
    """
    if any(name in os.environ for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    kept = mallopt(_MMAP_THRESHOLD, _KEPT_TO) or mallopt(_MMAP_THRESHOLD, _MOST_OF_OLD_RELEASES)
    return bool(kept and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
