"""Configuration of glibc's malloc for training steps, which allocate the same memory repeatedly."""

from __future__ import annotations

import ctypes
import functools
import sys

# Of glibc's <malloc.h>.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
PAD = 256 * 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations; return whether that is possible here.

    XLA's CPU backend allocates a step's temporaries with malloc. By default glibc returns large blocks to the kernel at
    once, which has to clear them page by page in the next step: about a fifth of MoVQ's training step, and not
    measurable for a small UNet. In exchange the process stays at its peak size.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No separate mappings for large blocks, and the end of the heap is never returned.
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(TOP_PAD, PAD)])
